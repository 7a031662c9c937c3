// For tests: a model file whose reads a test can watch, hold up and spoil.
#ifndef STAGECOACH_WORKER_HOOKED_FILE_H_
#define STAGECOACH_WORKER_HOOKED_FILE_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "model/file.h"
#include "model/model_file.h"
#include "model/test_paths.h"

namespace stagecoach {

// What the reads of a HookedFile go through. Shared by the file and the test. Thread-safe.
class ReadHook {
 public:
  using Function = std::function<absl::StatusOr<size_t>(const RandomAccessFile&, uint64_t,
                                                        std::span<std::byte>)>;
  void Set(Function function) {
    absl::MutexLock lock(&mu_);
    function_ = std::move(function);
  }
  void SetIdentityChange(bool changed) {
    absl::MutexLock lock(&mu_);
    identity_changed_ = changed;
  }
  Function Get() const {
    absl::MutexLock lock(&mu_);
    return function_;
  }
  bool identity_changed() const {
    absl::MutexLock lock(&mu_);
    return identity_changed_;
  }

 private:
  mutable absl::Mutex mu_;
  Function function_ ABSL_GUARDED_BY(mu_);
  bool identity_changed_ ABSL_GUARDED_BY(mu_) = false;
};

class HookedFile : public RandomAccessFile {
 public:
  HookedFile(std::unique_ptr<RandomAccessFile> base, std::shared_ptr<ReadHook> hook)
      : base_(std::move(base)), hook_(std::move(hook)) {}
  absl::StatusOr<size_t> ReadSome(uint64_t offset, std::span<std::byte> out) const override {
    const ReadHook::Function function = hook_->Get();
    return function ? function(*base_, offset, out) : base_->ReadSome(offset, out);
  }
  const std::string& path() const override { return base_->path(); }
  uint64_t size() const override { return base_->size(); }
  absl::StatusOr<FileIdentity> Identity() const override {
    absl::StatusOr<FileIdentity> identity = base_->Identity();
    if (identity.ok() && hook_->identity_changed()) ++identity->mtime_ns;
    return identity;
  }

 private:
  const std::unique_ptr<RandomAccessFile> base_;
  const std::shared_ptr<ReadHook> hook_;
};

// A file of tests/data as a model, read through `hook`.
inline absl::StatusOr<std::shared_ptr<const ModelFile>> OpenHookedModel(
    const std::string& name, std::shared_ptr<ReadHook> hook) {
  auto file = OpenFile(TestDataPath(name));
  if (!file.ok()) return file.status();
  std::vector<std::unique_ptr<RandomAccessFile>> files;
  files.push_back(std::make_unique<HookedFile>(*std::move(file), std::move(hook)));
  return ModelFile::FromFiles(std::move(files));
}

}  // namespace stagecoach

#endif  // STAGECOACH_WORKER_HOOKED_FILE_H_
