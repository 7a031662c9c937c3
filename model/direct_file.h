// Reads that pass the page cache by (O_DIRECT), for weights that would only push other things out
// of it.
#ifndef STAGECOACH_MODEL_DIRECT_FILE_H_
#define STAGECOACH_MODEL_DIRECT_FILE_H_

#include <sys/types.h>
#include <unistd.h>

#include <cstddef>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "model/file.h"

namespace stagecoach {

enum class ReadMode {
  kBuffered,  // through the page cache
  kDirect,    // past it, wherever file system and alignment allow
  kAuto,      // kDirect for files above half of the host's memory, else kBuffered
};

// What position, length and address of a direct read are multiples of. Covers every common device.
inline constexpr size_t kDirectAlignment = 4096;

// As OpenFile(path), with the mode of reading. In kDirect, reads that are not aligned, the last
// partial block of the file and ranges that the file system refuses (EINVAL) go through the page
// cache; a file system that knows no O_DIRECT gives an ordinary buffered file, whose
// read_alignment() is 1.
absl::StatusOr<std::unique_ptr<RandomAccessFile>> OpenFile(const std::string& path, ReadMode mode);

// The decorator behind it. Owns `direct_fd`, which is the same file as `buffered`, opened with
// O_DIRECT. Tests put a system call that refuses in the place of pread.
using PreadFunction = ssize_t (*)(int fd, void* out, size_t size, off_t offset);
std::unique_ptr<RandomAccessFile> MakeDirectFile(std::unique_ptr<RandomAccessFile> buffered,
                                                 int direct_fd, PreadFunction pread = &::pread);

}  // namespace stagecoach

#endif  // STAGECOACH_MODEL_DIRECT_FILE_H_
