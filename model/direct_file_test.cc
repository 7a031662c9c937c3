#include "model/direct_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "model/faulty_file.h"
#include "model/model_error.h"

namespace stagecoach {
namespace {

constexpr size_t kBlock = kDirectAlignment;

// A file in `folder` that goes away with the test.
class TempFile {
 public:
  explicit TempFile(const std::string& bytes, const std::string& folder = ::testing::TempDir())
      : path_(folder + "/direct_file_test." + std::to_string(::getpid())) {
    std::ofstream(path_, std::ios::binary) << bytes;
  }
  ~TempFile() { std::filesystem::remove(path_); }
  const std::string& path() const { return path_; }

 private:
  const std::string path_;
};

std::string Pattern(size_t size) {
  std::string bytes(size, '\0');
  for (size_t i = 0; i < size; ++i) bytes[i] = static_cast<char>(i * 131 + (i >> 8));
  return bytes;
}

// Memory whose address is `shift` past a multiple of the alignment.
class Buffer {
 public:
  Buffer(size_t size, size_t shift)
      : memory_(static_cast<std::byte*>(
            std::aligned_alloc(kBlock, (size + shift + kBlock - 1) / kBlock * kBlock))),
        span_(memory_ + shift, size) {}
  ~Buffer() { std::free(memory_); }
  std::span<std::byte> span() const { return span_; }
  std::string text() const {
    return std::string(reinterpret_cast<const char*>(span_.data()), span_.size());
  }

 private:
  std::byte* const memory_;
  const std::span<std::byte> span_;
};

std::unique_ptr<RandomAccessFile> Open(const std::string& path, ReadMode mode = ReadMode::kDirect) {
  auto file = OpenFile(path, mode);
  EXPECT_TRUE(file.ok()) << file.status();
  return *std::move(file);
}

// Every mix of positions, lengths and addresses, aligned or not, gives the file's bytes.
void ExpectReadsAnyRange(const RandomAccessFile& file, const std::string& bytes) {
  for (const size_t offset : {size_t{0}, size_t{1}, kBlock - 1, kBlock, 3 * kBlock + 17}) {
    for (const size_t size : {size_t{1}, kBlock, 2 * kBlock + 5, bytes.size() - offset}) {
      for (const size_t shift : {size_t{0}, offset % kBlock, size_t{8}}) {
        const Buffer buffer(size, shift);
        const absl::Status status = ReadFully(file, offset, buffer.span());
        ASSERT_TRUE(status.ok()) << status;
        ASSERT_TRUE(buffer.text() == bytes.substr(offset, size))
            << offset << " + " << size << ", address " << shift;
      }
    }
  }
}

TEST(DirectFileTest, ReadsAnyRangeOfAnOddlySizedFile) {
  const std::string bytes = Pattern(9 * kBlock + 77);
  const TempFile temp(bytes);
  const auto file = Open(temp.path());
  EXPECT_EQ(file->size(), bytes.size());
  ExpectReadsAnyRange(*file, bytes);
}

TEST(DirectFileTest, PartialLastBlockIsReadInPieces) {
  const std::string bytes = Pattern(2 * kBlock + 100);
  const TempFile temp(bytes);
  const auto file = Open(temp.path());
  if (file->read_alignment() == 1) GTEST_SKIP() << "no O_DIRECT in " << temp.path();
  const Buffer buffer(2 * kBlock + 100, 0);
  EXPECT_EQ(file->ReadSome(0, buffer.span()).value(), 2 * kBlock) << "whole blocks only";
  EXPECT_TRUE(ReadFully(*file, 0, buffer.span()).ok());
  EXPECT_EQ(buffer.text(), bytes);
}

TEST(DirectFileTest, TmpfsIsReadWhateverItSaysToDirectReads) {
  if (!std::filesystem::exists("/dev/shm")) GTEST_SKIP() << "no tmpfs at /dev/shm";
  const std::string bytes = Pattern(9 * kBlock + 77);
  const TempFile temp(bytes, "/dev/shm");
  ExpectReadsAnyRange(*Open(temp.path()), bytes);
}

std::atomic<int> g_direct_reads = 0;

// Refuses what lies in the second block, as a file system may for a range without an extent.
ssize_t RefuseSecondBlock(int fd, void* out, size_t size, off_t offset) {
  ++g_direct_reads;
  const auto begin = static_cast<size_t>(offset);
  if (begin < 2 * kBlock && begin + size > kBlock) {
    errno = EINVAL;
    return -1;
  }
  return ::pread(fd, out, size, offset);
}

ssize_t FailAlways(int, void*, size_t, off_t) {
  errno = EIO;
  return -1;
}

TEST(DirectFileTest, RangesThatAreRefusedAreReadThroughThePageCache) {
  const std::string bytes = Pattern(9 * kBlock + 9);
  const TempFile temp(bytes);
  const auto file = MakeDirectFile(Open(temp.path(), ReadMode::kBuffered),
                                   ::open(temp.path().c_str(), O_RDONLY), &RefuseSecondBlock);
  ExpectReadsAnyRange(*file, bytes);
  EXPECT_GT(g_direct_reads, 0);
}

TEST(DirectFileTest, AFailureIsNotARefusal) {
  const TempFile temp(Pattern(5 * kBlock));
  const auto file = MakeDirectFile(Open(temp.path(), ReadMode::kBuffered),
                                   ::open(temp.path().c_str(), O_RDONLY), &FailAlways);
  const Buffer buffer(5 * kBlock, 0);
  const absl::Status status = ReadFully(*file, 0, buffer.span());
  EXPECT_EQ(GetModelError(status), ModelError::kIo);
  EXPECT_THAT(std::string(status.message()), ::testing::HasSubstr(temp.path()));
}

TEST(DirectFileTest, TruncationIsTypedAndSaysWhere) {
  const TempFile temp(Pattern(8 * kBlock));
  const auto file = Open(temp.path());
  std::filesystem::resize_file(temp.path(), 5 * kBlock + 10);
  const Buffer buffer(8 * kBlock, 0);
  const absl::Status status = ReadFully(*file, 0, buffer.span());
  EXPECT_EQ(GetModelError(status), ModelError::kTruncated);
  EXPECT_THAT(std::string(status.message()),
              ::testing::HasSubstr("ends at byte " + std::to_string(5 * kBlock + 10)));
}

TEST(DirectFileTest, SevenByteChunksAndFailuresAreOvercome) {
  const std::string bytes = Pattern(2 * kBlock + 100);
  const TempFile temp(bytes);
  const FaultyFile file(Open(temp.path()),
                        {.max_chunk = 7, .first_failure = 20, .failures = kReadRetries});
  const Buffer buffer(bytes.size(), 0);
  const absl::Status status = ReadFully(file, 0, buffer.span());
  ASSERT_TRUE(status.ok()) << status;
  EXPECT_EQ(buffer.text(), bytes);
}

TEST(DirectFileTest, OffsetsBeyondFourGigabytes) {
  const TempFile temp("");
  constexpr uint64_t kFar = (uint64_t{5} << 30) + kBlock;
  const std::string bytes = Pattern(3 * kBlock);
  std::filesystem::resize_file(temp.path(), kFar + bytes.size());  // sparse
  std::fstream out(temp.path(), std::ios::binary | std::ios::in | std::ios::out);
  out.seekp(static_cast<std::streamoff>(kFar));
  out << bytes << std::flush;
  const auto file = Open(temp.path());
  EXPECT_EQ(file->size(), kFar + bytes.size());
  const Buffer buffer(bytes.size(), 0);
  ASSERT_TRUE(ReadFully(*file, kFar, buffer.span()).ok());
  EXPECT_EQ(buffer.text(), bytes);
}

TEST(DirectFileTest, AutoReadsSmallFilesThroughThePageCache) {
  const TempFile temp(Pattern(kBlock));
  EXPECT_EQ(Open(temp.path(), ReadMode::kAuto)->read_alignment(), 1u);
}

TEST(DirectFileTest, AutoReadsFilesLargerThanMemoryDirectly) {
  const TempFile temp("");
  std::filesystem::resize_file(temp.path(), uint64_t{4} << 40);  // sparse
  if (Open(temp.path())->read_alignment() == 1) GTEST_SKIP() << "no O_DIRECT in " << temp.path();
  EXPECT_EQ(Open(temp.path(), ReadMode::kAuto)->read_alignment(), kDirectAlignment);
}

TEST(DirectFileTest, ErrorsOfOpeningAreTheSameInEveryMode) {
  for (const ReadMode mode : {ReadMode::kBuffered, ReadMode::kDirect, ReadMode::kAuto}) {
    EXPECT_TRUE(absl::IsNotFound(OpenFile("/no/such/file", mode).status()));
    EXPECT_EQ(GetModelError(OpenFile(::testing::TempDir(), mode).status()), ModelError::kIo);
  }
}

}  // namespace
}  // namespace stagecoach
