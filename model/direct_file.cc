#include "model/direct_file.h"

#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <system_error>
#include <utility>

#include "fmt/format.h"
#include "model/model_error.h"

namespace stagecoach {
namespace {

// One read() returns at most 0x7ffff000 bytes; a multiple of the alignment below that.
constexpr size_t kMaxReadBytes = size_t{1} << 30;

class DirectFile : public RandomAccessFile {
 public:
  DirectFile(std::unique_ptr<RandomAccessFile> buffered, int direct_fd, PreadFunction pread)
      : buffered_(std::move(buffered)), fd_(direct_fd), pread_(pread) {}
  ~DirectFile() override { ::close(fd_); }
  DirectFile(const DirectFile&) = delete;
  DirectFile& operator=(const DirectFile&) = delete;

  absl::StatusOr<size_t> ReadSome(uint64_t offset, std::span<std::byte> out) const override {
    const size_t misaligned = offset % kDirectAlignment;
    const size_t address = reinterpret_cast<uintptr_t>(out.data()) % kDirectAlignment;
    if (address != misaligned) return buffered_->ReadSome(offset, out);  // they never meet
    if (misaligned != 0) {  // up to where direct reads can begin
      return buffered_->ReadSome(offset,
                                 out.first(std::min(out.size(), kDirectAlignment - misaligned)));
    }
    const size_t whole = std::min(out.size() / kDirectAlignment * kDirectAlignment, kMaxReadBytes);
    if (whole == 0 || offset >= size()) return buffered_->ReadSome(offset, out);
    ssize_t n = 0;
    do {
      n = pread_(fd_, out.data(), whole, static_cast<off_t>(offset));
    } while (n < 0 && (errno == EINTR || errno == EAGAIN));
    if (n >= 0) return static_cast<size_t>(n);
    if (errno == EINVAL || errno == EOPNOTSUPP) {
      return buffered_->ReadSome(offset, out.first(whole));
    }
    return MakeModelError(ModelError::kIo,
                          fmt::format("cannot read '{}' at byte {}: {}", path(), offset,
                                      std::generic_category().message(errno)));
  }

  size_t read_alignment() const override { return kDirectAlignment; }
  const std::string& path() const override { return buffered_->path(); }
  uint64_t size() const override { return buffered_->size(); }
  absl::StatusOr<FileIdentity> Identity() const override { return buffered_->Identity(); }

 private:
  const std::unique_ptr<RandomAccessFile> buffered_;
  const int fd_;
  const PreadFunction pread_;
};

bool IsSameFile(int fd, const RandomAccessFile& file) {
  struct stat st {};
  const absl::StatusOr<FileIdentity> identity = file.Identity();
  return ::fstat(fd, &st) == 0 && identity.ok() && st.st_dev == identity->device &&
         st.st_ino == identity->inode;
}

// Half of the host's memory: a larger file would find little of itself in the page cache.
uint64_t LargestCachedFile() {
  const int64_t pages = ::sysconf(_SC_PHYS_PAGES);
  const int64_t page_bytes = ::sysconf(_SC_PAGESIZE);
  return pages > 0 && page_bytes > 0 ? static_cast<uint64_t>(pages) * page_bytes / 2 : UINT64_MAX;
}

}  // namespace

std::unique_ptr<RandomAccessFile> MakeDirectFile(std::unique_ptr<RandomAccessFile> buffered,
                                                 int direct_fd, PreadFunction pread) {
  return std::make_unique<DirectFile>(std::move(buffered), direct_fd, pread);
}

absl::StatusOr<std::unique_ptr<RandomAccessFile>> OpenFile(const std::string& path, ReadMode mode) {
  if (mode == ReadMode::kBuffered) return OpenFile(path);
  // The direct descriptor is opened first: if another file takes the path in between, the
  // identities differ.
  const int direct_fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_DIRECT);
  absl::StatusOr<std::unique_ptr<RandomAccessFile>> buffered = OpenFile(path);
  if (direct_fd < 0) return buffered;
  const bool wanted = buffered.ok() && IsSameFile(direct_fd, **buffered) &&
                      (mode == ReadMode::kDirect || (*buffered)->size() > LargestCachedFile());
  if (wanted) return MakeDirectFile(*std::move(buffered), direct_fd);
  ::close(direct_fd);
  return buffered;
}

}  // namespace stagecoach
