#include "model/file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <optional>
#include <utility>

#include "fmt/format.h"
#include "model/model_error.h"

namespace stagecoach {
namespace {

std::string ErrnoText(int error) { return std::generic_category().message(error); }

FileIdentity IdentityOf(const struct stat& st) {
  return {
      .device = st.st_dev,
      .inode = st.st_ino,
      .size = static_cast<uint64_t>(st.st_size),
      .mtime_ns = static_cast<int64_t>(st.st_mtim.tv_sec) * 1'000'000'000 + st.st_mtim.tv_nsec,
  };
}

class PosixFile : public RandomAccessFile {
 public:
  // Owns `fd`.
  PosixFile(int fd, std::string path, uint64_t size)
      : fd_(fd), path_(std::move(path)), size_(size) {}
  ~PosixFile() override { ::close(fd_); }
  PosixFile(const PosixFile&) = delete;
  PosixFile& operator=(const PosixFile&) = delete;

  absl::StatusOr<size_t> ReadSome(uint64_t offset, std::span<std::byte> out) const override {
    if (offset >= size_) return size_t{0};
    ssize_t n = 0;
    do {
      n = ::pread(fd_, out.data(), out.size(), static_cast<off_t>(offset));
    } while (n < 0 && (errno == EINTR || errno == EAGAIN));
    if (n < 0) {
      return MakeModelError(ModelError::kIo, fmt::format("cannot read '{}' at byte {}: {}", path_,
                                                         offset, ErrnoText(errno)));
    }
    return static_cast<size_t>(n);
  }

  const std::string& path() const override { return path_; }
  uint64_t size() const override { return size_; }

  // Asks by path first, so that a file put in this one's place by rename is noticed. A path that is
  // gone (unlinked, unmounted namespace) leaves the open file as it was.
  absl::StatusOr<FileIdentity> Identity() const override {
    struct stat st {};
    if (::stat(path_.c_str(), &st) != 0 && ::fstat(fd_, &st) != 0) {
      return MakeModelError(ModelError::kIo,
                            fmt::format("cannot stat '{}': {}", path_, ErrnoText(errno)));
    }
    return IdentityOf(st);
  }

 private:
  const int fd_;
  const std::string path_;
  const uint64_t size_;
};

class MemoryFile : public RandomAccessFile {
 public:
  MemoryFile(std::string path, std::string bytes)
      : path_(std::move(path)), bytes_(std::move(bytes)) {}

  absl::StatusOr<size_t> ReadSome(uint64_t offset, std::span<std::byte> out) const override {
    if (offset >= bytes_.size() || out.empty()) return size_t{0};
    const size_t n = std::min<uint64_t>(out.size(), bytes_.size() - offset);
    std::memcpy(out.data(), bytes_.data() + offset, n);
    return n;
  }

  const std::string& path() const override { return path_; }
  uint64_t size() const override { return bytes_.size(); }
  absl::StatusOr<FileIdentity> Identity() const override {
    return FileIdentity{.size = bytes_.size()};
  }

 private:
  const std::string path_;
  const std::string bytes_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<RandomAccessFile>> OpenFile(const std::string& path) {
  // O_NONBLOCK: opening a FIFO must not wait for its writer. It has no effect on regular files.
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) {
    const int error = errno;
    const std::string message = fmt::format("cannot open '{}': {}", path, ErrnoText(error));
    if (error == ENOENT || error == ENOTDIR) return absl::NotFoundError(message);
    if (error == EACCES || error == EPERM) return absl::PermissionDeniedError(message);
    return MakeModelError(ModelError::kIo, message);
  }
  struct stat st {};
  if (::fstat(fd, &st) != 0 || !S_ISREG(st.st_mode)) {
    ::close(fd);
    return MakeModelError(ModelError::kIo,
                          fmt::format("'{}' is not a regular file; give the path of a file", path));
  }
  return std::make_unique<PosixFile>(fd, path, static_cast<uint64_t>(st.st_size));
}

std::unique_ptr<RandomAccessFile> MakeMemoryFile(std::string path, std::string bytes) {
  return std::make_unique<MemoryFile>(std::move(path), std::move(bytes));
}

absl::Status ReadFully(const RandomAccessFile& file, uint64_t offset, std::span<std::byte> out) {
  int failures = 0;
  while (!out.empty()) {
    const absl::StatusOr<size_t> n = file.ReadSome(offset, out);
    if (!n.ok()) {
      if (GetModelError(n.status()) != ModelError::kIo || ++failures > kReadRetries) {
        return n.status();
      }
      continue;
    }
    if (*n == 0) {
      return MakeModelError(
          ModelError::kTruncated,
          fmt::format("'{}' ends at byte {}, {} bytes before the end of what was asked for",
                      file.path(), offset, out.size()));
    }
    failures = 0;
    offset += *n;
    out = out.subspan(*n);
  }
  return absl::OkStatus();
}

}  // namespace stagecoach
