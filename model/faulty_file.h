// A file that fails on purpose, for tests of whatever reads through RandomAccessFile.
#ifndef STAGECOACH_MODEL_FAULTY_FILE_H_
#define STAGECOACH_MODEL_FAULTY_FILE_H_

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "model/file.h"
#include "model/model_error.h"

namespace stagecoach {

struct FaultPlan {
  static constexpr uint64_t kNever = std::numeric_limits<uint64_t>::max();

  size_t max_chunk = SIZE_MAX;  // a read returns at most this many bytes, e.g. 7
  // Reads number first_failure, first_failure + 1, ... (counted from 0) fail with kIo, this many.
  uint64_t first_failure = kNever;
  uint64_t failures = 1;
  // Reads that touch bytes [bad_begin, bad_end) fail with kIo, always.
  uint64_t bad_begin = 0;
  uint64_t bad_end = 0;
  // The file turns out to end here, whatever size() said at open.
  uint64_t truncate_at = kNever;
  // What Identity() answers instead of the truth.
  std::optional<FileIdentity> identity;
};

// Decorates a file. Thread-safe.
class FaultyFile : public RandomAccessFile {
 public:
  FaultyFile(std::unique_ptr<RandomAccessFile> file, FaultPlan plan)
      : file_(std::move(file)), plan_(plan) {}

  absl::StatusOr<size_t> ReadSome(uint64_t offset, std::span<std::byte> out) const override {
    const uint64_t read = reads_.fetch_add(1);
    out = out.first(std::min(out.size(), plan_.max_chunk));
    const bool unlucky = read >= plan_.first_failure && read - plan_.first_failure < plan_.failures;
    const bool bad_range = offset < plan_.bad_end && offset + out.size() > plan_.bad_begin;
    if (unlucky || bad_range) {
      return MakeModelError(ModelError::kIo, "injected failure at byte " + std::to_string(offset));
    }
    if (offset >= plan_.truncate_at) return size_t{0};
    return file_->ReadSome(offset,
                           out.first(std::min<uint64_t>(out.size(), plan_.truncate_at - offset)));
  }

  const std::string& path() const override { return file_->path(); }
  uint64_t size() const override { return file_->size(); }
  absl::StatusOr<FileIdentity> Identity() const override {
    if (plan_.identity) return *plan_.identity;
    return file_->Identity();
  }

  uint64_t reads() const { return reads_.load(); }  // so far

 private:
  const std::unique_ptr<RandomAccessFile> file_;
  const FaultPlan plan_;
  mutable std::atomic<uint64_t> reads_{0};
};

}  // namespace stagecoach

#endif  // STAGECOACH_MODEL_FAULTY_FILE_H_
