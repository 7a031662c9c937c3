#include "model/file.h"

#include <signal.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "model/faulty_file.h"
#include "model/model_error.h"

namespace stagecoach {
namespace {

using ::testing::HasSubstr;

std::string PathOf(const std::string& name) {
  const auto* info = ::testing::UnitTest::GetInstance()->current_test_info();
  return ::testing::TempDir() + info->name() + "." + std::to_string(::getpid()) + "." + name;
}

std::string WriteFile(const std::string& name, const std::string& bytes) {
  const std::string path = PathOf(name);
  std::ofstream(path, std::ios::binary) << bytes;
  return path;
}

std::string Pattern(size_t size) {
  std::string bytes(size, '\0');
  for (size_t i = 0; i < size; ++i) bytes[i] = static_cast<char>(i * 131 + (i >> 8));
  return bytes;
}

absl::StatusOr<std::string> ReadAt(const RandomAccessFile& file, uint64_t offset, size_t size) {
  std::string out(size, '\0');
  const absl::Status status = ReadFully(file, offset, std::as_writable_bytes(std::span<char>(out)));
  if (!status.ok()) return status;
  return out;
}

TEST(FileTest, ReadsAnyRange) {
  const std::string bytes = Pattern(100'000);
  const auto file = OpenFile(WriteFile("data", bytes));
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ((*file)->size(), bytes.size());
  EXPECT_EQ(ReadAt(**file, 0, bytes.size()).value(), bytes);
  EXPECT_EQ(ReadAt(**file, 99'990, 10).value(), bytes.substr(99'990));
  EXPECT_EQ(ReadAt(**file, 100'000, 0).value(), "");
}

TEST(FileTest, PastTheEndIsTruncatedWithTheOffset) {
  const auto file = OpenFile(WriteFile("data", Pattern(100)));
  ASSERT_TRUE(file.ok()) << file.status();
  const absl::Status status = ReadAt(**file, 90, 20).status();
  EXPECT_EQ(GetModelError(status), ModelError::kTruncated);
  EXPECT_THAT(std::string(status.message()), HasSubstr("ends at byte 100"));
}

TEST(FileTest, ShrunkenFileIsTruncatedAndNotASignal) {
  const std::string path = WriteFile("data", Pattern(10'000));
  const auto file = OpenFile(path);
  ASSERT_TRUE(file.ok()) << file.status();
  std::filesystem::resize_file(path, 5'000);
  EXPECT_EQ(GetModelError(ReadAt(**file, 4'000, 2'000).status()), ModelError::kTruncated);
  EXPECT_TRUE(ReadAt(**file, 4'000, 1'000).ok());
}

TEST(FileTest, OpensOnlyRegularFiles) {
  EXPECT_TRUE(absl::IsNotFound(OpenFile(PathOf("absent")).status()));
  EXPECT_TRUE(absl::IsNotFound(OpenFile(WriteFile("file", "x") + "/below").status()));
  EXPECT_EQ(GetModelError(OpenFile(::testing::TempDir()).status()), ModelError::kIo);
  EXPECT_EQ(GetModelError(OpenFile("/dev/zero").status()), ModelError::kIo);
  const std::string fifo = PathOf("fifo");
  ASSERT_EQ(::mkfifo(fifo.c_str(), 0600), 0);
  EXPECT_EQ(GetModelError(OpenFile(fifo).status()), ModelError::kIo);
}

TEST(FileTest, IdentityTellsRewriteAndReplacement) {
  const std::string path = WriteFile("data", "one");
  const auto file = OpenFile(path);
  ASSERT_TRUE(file.ok()) << file.status();
  const FileIdentity opened = (*file)->Identity().value();
  EXPECT_EQ((*file)->Identity().value(), opened);
  std::filesystem::rename(WriteFile("other", "two"), path);
  EXPECT_NE((*file)->Identity().value(), opened);
  EXPECT_EQ(ReadAt(**file, 0, 3).value(), "one") << "the open file stays what it was";

  const auto replaced = OpenFile(path);
  ASSERT_TRUE(replaced.ok()) << replaced.status();
  const FileIdentity before = (*replaced)->Identity().value();
  std::ofstream(path, std::ios::app) << "more";
  EXPECT_NE((*replaced)->Identity().value(), before);

  const FileIdentity grown = (*replaced)->Identity().value();
  std::filesystem::remove(path);
  EXPECT_EQ((*replaced)->Identity().value(), grown) << "an unlinked file is still the same file";
}

// Reads under a storm of signals whose handlers do not restart system calls.
TEST(FileTest, SignalsDoNotDisturbReads) {
  const std::string bytes = Pattern(1 << 20);
  const auto file = OpenFile(WriteFile("data", bytes));
  ASSERT_TRUE(file.ok()) << file.status();
  struct sigaction action {
  }, old_action{};
  action.sa_handler = [](int) {};
  ASSERT_EQ(::sigaction(SIGALRM, &action, &old_action), 0);
  const itimerval storm{{0, 100}, {0, 100}}, calm{};
  ASSERT_EQ(::setitimer(ITIMER_REAL, &storm, nullptr), 0);
  for (int i = 0; i < 50; ++i) EXPECT_EQ(ReadAt(**file, 0, bytes.size()).value(), bytes);
  ::setitimer(ITIMER_REAL, &calm, nullptr);
  ::sigaction(SIGALRM, &old_action, nullptr);
}

TEST(FaultyFileTest, SevenByteChunksAreJoined) {
  const std::string bytes = Pattern(1000);
  const FaultyFile file(MakeMemoryFile("memory", bytes), {.max_chunk = 7});
  EXPECT_EQ(ReadAt(file, 3, 990).value(), bytes.substr(3, 990));
  EXPECT_EQ(file.reads(), 142u);
}

TEST(FaultyFileTest, ReadFullyRetriesABoundedNumberOfTimes) {
  const std::string bytes = Pattern(100);
  const FaultyFile recovers(MakeMemoryFile("memory", bytes),
                            {.max_chunk = 10, .first_failure = 4, .failures = kReadRetries});
  EXPECT_EQ(ReadAt(recovers, 0, 100).value(), bytes);
  const FaultyFile fails(MakeMemoryFile("memory", bytes),
                         {.max_chunk = 10, .first_failure = 4, .failures = kReadRetries + 1});
  const absl::Status status = ReadAt(fails, 0, 100).status();
  EXPECT_EQ(GetModelError(status), ModelError::kIo);
  EXPECT_THAT(std::string(status.message()), HasSubstr("byte 40"));
  EXPECT_EQ(fails.reads(), 4u + kReadRetries + 1);
}

TEST(FaultyFileTest, BadRangeAndTruncation) {
  const FaultyFile bad(MakeMemoryFile("memory", Pattern(100)), {.bad_begin = 50, .bad_end = 60});
  EXPECT_TRUE(ReadAt(bad, 0, 50).ok());
  EXPECT_TRUE(ReadAt(bad, 60, 40).ok());
  EXPECT_EQ(GetModelError(ReadAt(bad, 40, 11).status()), ModelError::kIo);
  const FaultyFile cut(MakeMemoryFile("memory", Pattern(100)), {.truncate_at = 64});
  EXPECT_TRUE(ReadAt(cut, 0, 64).ok());
  EXPECT_EQ(GetModelError(ReadAt(cut, 0, 65).status()), ModelError::kTruncated);
}

}  // namespace
}  // namespace stagecoach
