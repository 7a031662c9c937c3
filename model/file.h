// Positioned reads: the seam between the project and storage. Never memory-mapped, so a file that
// shrinks is an error and not a signal.
#ifndef STAGECOACH_MODEL_FILE_H_
#define STAGECOACH_MODEL_FILE_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace stagecoach {

// What tells one version of a file from another.
struct FileIdentity {
  uint64_t device = 0;
  uint64_t inode = 0;
  uint64_t size = 0;
  int64_t mtime_ns = 0;
  friend bool operator==(const FileIdentity&, const FileIdentity&) = default;
};

// Thread-safe: reads carry their own position.
class RandomAccessFile {
 public:
  virtual ~RandomAccessFile() = default;

  // Reads up to out.size() bytes at `offset` into `out` and returns how many; 0 only at or past the
  // end of the file. May be short. Errors: ModelError::kIo.
  virtual absl::StatusOr<size_t> ReadSome(uint64_t offset, std::span<std::byte> out) const = 0;

  virtual const std::string& path() const = 0;
  virtual uint64_t size() const = 0;  // at open

  // Reads whose position, length and address are multiples of this are the fastest.
  virtual size_t read_alignment() const { return 1; }

  // The identity now (kept from open for files that cannot change).
  virtual absl::StatusOr<FileIdentity> Identity() const = 0;
};

// Opens a regular file for buffered reads. Errors: NOT_FOUND, PERMISSION_DENIED, kIo; a directory
// or a device is kIo.
absl::StatusOr<std::unique_ptr<RandomAccessFile>> OpenFile(const std::string& path);

// A file in memory, for tests and fuzzing. Owns `bytes`.
std::unique_ptr<RandomAccessFile> MakeMemoryFile(std::string path, std::string bytes);

// Fills all of `out`, looping over short reads and retrying a read that fails with kIo up to
// kReadRetries times. Errors: kTruncated with the offset at which the file ended; kIo.
inline constexpr int kReadRetries = 3;
absl::Status ReadFully(const RandomAccessFile& file, uint64_t offset, std::span<std::byte> out);

}  // namespace stagecoach

#endif  // STAGECOACH_MODEL_FILE_H_
