// Files that must be refused, or accepted, in a known way: with the right code, a message that says
// where, within a second and without much memory.
#include <malloc.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "model/gguf_image.h"
#include "model/gguf_malformed_cases.h"
#include "model/model_error.h"
#include "model/model_file.h"

namespace {

// Bytes allocated through operator new and not yet freed, and their maximum.
std::atomic<int64_t> live_bytes{0};
std::atomic<int64_t> peak_bytes{0};

void* CountedNew(size_t size) {
  void* p = std::malloc(size);
  if (p == nullptr) throw std::bad_alloc();
  const int64_t live = live_bytes += static_cast<int64_t>(malloc_usable_size(p));
  if (live > peak_bytes) peak_bytes = live;  // the tests allocate from one thread
  return p;
}

void CountedDelete(void* p) {
  if (p != nullptr) live_bytes -= static_cast<int64_t>(malloc_usable_size(p));
  std::free(p);
}

}  // namespace

void* operator new(size_t size) { return CountedNew(size); }
void* operator new[](size_t size) { return CountedNew(size); }
void operator delete(void* p) noexcept { CountedDelete(p); }
void operator delete[](void* p) noexcept { CountedDelete(p); }
void operator delete(void* p, size_t) noexcept { CountedDelete(p); }
void operator delete[](void* p, size_t) noexcept { CountedDelete(p); }

namespace stagecoach {
namespace {

using ::testing::HasSubstr;

constexpr int64_t kMaxExtraBytes = 64 << 20;

absl::StatusOr<std::shared_ptr<const ModelFile>> OpenBytes(std::vector<std::string> parts) {
  std::vector<std::unique_ptr<RandomAccessFile>> files;
  for (std::string& bytes : parts) files.push_back(MakeMemoryFile("test.gguf", std::move(bytes)));
  return ModelFile::FromFiles(std::move(files));
}

class GgufMalformedTest : public ::testing::TestWithParam<MalformedCase> {};

TEST_P(GgufMalformedTest, IsAnsweredInAKnownWay) {
  const MalformedCase& c = GetParam();
  std::vector<std::string> parts = c.parts();
  const int64_t before = live_bytes;
  peak_bytes = before;
  const auto start = std::chrono::steady_clock::now();
  const auto model = OpenBytes(std::move(parts));
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  EXPECT_LT(seconds.count(), 1.0);
  EXPECT_LE(peak_bytes - before, kMaxExtraBytes);
  if (!c.expected) {
    EXPECT_TRUE(model.ok()) << model.status();
    return;
  }
  ASSERT_FALSE(model.ok()) << "was accepted";
  const std::string message(model.status().message());
  ASSERT_TRUE(GetModelError(model.status())) << message;
  EXPECT_EQ(ModelErrorName(*GetModelError(model.status())), ModelErrorName(*c.expected)) << message;
  EXPECT_THAT(message, HasSubstr(c.mentions));
  EXPECT_THAT(message, HasSubstr("byte"));
  EXPECT_THAT(message, HasSubstr("test.gguf"));
  EXPECT_EQ(message.find_first_of(std::string("\0\n\x1b", 3)), std::string::npos) << "not escaped";
}

std::string CaseName(const ::testing::TestParamInfo<MalformedCase>& info) {
  std::string name = info.param.name;
  for (char& c : name) {
    if (!std::isalnum(static_cast<unsigned char>(c))) c = '_';
  }
  return name;
}

#define STAGECOACH_MALFORMED(group) \
  INSTANTIATE_TEST_SUITE_P(group, GgufMalformedTest, ::testing::ValuesIn(group##Cases()), CaseName)
STAGECOACH_MALFORMED(Header);
STAGECOACH_MALFORMED(Key);
STAGECOACH_MALFORMED(ArrayAndString);
STAGECOACH_MALFORMED(Alignment);
STAGECOACH_MALFORMED(RequiredKey);
STAGECOACH_MALFORMED(Hparam);
STAGECOACH_MALFORMED(TensorNameAndShape);
STAGECOACH_MALFORMED(TensorPlace);
STAGECOACH_MALFORMED(Model);
STAGECOACH_MALFORMED(Split);

TEST(GgufMalformedSweepTest, EveryTruncationIsRefused) {
  const std::string bytes = TinyLlamaImage().Bytes();
  for (size_t size = 0; size < bytes.size(); size += size < 3000 ? 1 : 97) {
    const auto model = OpenBytes({bytes.substr(0, size)});
    ASSERT_FALSE(model.ok()) << size;
    const std::optional<ModelError> error = GetModelError(model.status());
    // A key whose length reaches past the end is LIMIT; what else is cut is TRUNCATED.
    EXPECT_TRUE(error == ModelError::kTruncated || error == ModelError::kLimit)
        << size << ": " << model.status();
  }
}

TEST(GgufMalformedSweepTest, EveryDamagedHeaderByteIsSurvived) {
  const std::string bytes = TinyLlamaImage().Bytes();
  const size_t header = TinyLlamaImage().HeaderBytes().size();
  int refused = 0;
  for (size_t i = 0; i < header; ++i) {
    for (const int mask : {0x01, 0x80, 0xff}) {
      std::string damaged = bytes;
      damaged[i] = static_cast<char>(damaged[i] ^ mask);
      const auto model = OpenBytes({damaged});
      if (model.ok()) continue;
      ++refused;
      EXPECT_TRUE(GetModelError(model.status())) << i << ": " << model.status();
    }
  }
  EXPECT_GT(refused, static_cast<int>(header));
}

}  // namespace
}  // namespace stagecoach
