// A value that overflows while a model runs ends the request it belongs to and nothing else: real
// processes, a model whose weights are all finite, and one token that no layer can bear.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <string>
#include <thread>
#include <vector>

#include "model/file.h"
#include "model/gguf.h"
#include "tests/process_fixture.h"

namespace stagecoach {
namespace {

constexpr int32_t kPoison = 321;
constexpr int kColumn = 7;  // of the residual stream; only kPoison has anything there
constexpr float kHuge = 3e38f;
constexpr int kKvBlocks = 40;

// A copy of the bundled F32 model. Before the first feed-forward network the residual's kColumn is
// zero for every token but kPoison, and one row of that network's gate and up matrices has kHuge in
// this column: its product is infinite for kPoison and zero for the others.
class PoisonModel {
 public:
  explicit PoisonModel(const std::string& path) : bytes_(ReadTestFile(path)) {
    const auto file = MakeMemoryFile(path, bytes_);
    auto gguf = GgufFile::Parse(*file);
    EXPECT_TRUE(gguf.ok()) << gguf.status();
    const TensorInfo embedding = *gguf->FindTensor("token_embd.weight");
    for (uint64_t token = 0; token < embedding.dims[1]; ++token) {
      Set(embedding, token, kColumn, token == kPoison ? 100 : 0);
    }
    const TensorInfo output = *gguf->FindTensor("blk.0.attn_output.weight");
    for (uint64_t column = 0; column < output.columns(); ++column) Set(output, kColumn, column, 0);
    Set(*gguf->FindTensor("blk.0.ffn_gate.weight"), 0, kColumn, kHuge);
    Set(*gguf->FindTensor("blk.0.ffn_up.weight"), 0, kColumn, kHuge);
  }

  void Write(const std::string& path) const {
    std::ofstream(path, std::ios::binary).write(bytes_.data(), std::ssize(bytes_));
  }

 private:
  void Set(const TensorInfo& tensor, uint64_t row, uint64_t column, float value) {
    ASSERT_EQ(tensor.type, TensorType::kF32);
    std::memcpy(bytes_.data() + tensor.offset + 4 * (row * tensor.columns() + column), &value, 4);
  }

  std::string bytes_;
};

class ProcessPoisonTest : public testing::Test {
 protected:
  ProcessPoisonTest() {
    std::filesystem::create_directories(folder_);
    const std::string model = folder_ + "/poison.gguf";
    PoisonModel(TestDataPath("demo2-F32.gguf")).Write(model);
    LocalClusterOptions options = Options(2);
    options.model = model;
    options.context = 256;
    options.coordinator_flags = {"--kv-blocks", std::to_string(kKvBlocks)};
    service_ = MustServe(std::move(options));
  }
  ~ProcessPoisonTest() override {
    service_.reset();
    std::filesystem::remove_all(folder_);
  }

  // A prompt of ordinary tokens.
  static v1::GenerateRequest Ordinary(int seed, int length, int max_tokens) {
    v1::GenerateRequest request;
    for (int i = 0; i < length; ++i) {
      request.mutable_token_ids()->add_ids(3 + (i * 37 + seed * 101) % 300);
    }
    request.set_max_tokens(static_cast<uint32_t>(max_tokens));
    request.set_ignore_eos(true);
    v1::SamplingParams& sampling = *request.mutable_sampling();
    sampling.set_temperature(1);
    sampling.set_seed(static_cast<uint64_t>(seed));
    (*sampling.mutable_logit_bias())[kPoison] = -100;  // never says it by itself
    return request;
  }

  const std::string folder_ =
      std::filesystem::temp_directory_path() / ("stagecoach_poison_" + std::to_string(getpid()));
  std::unique_ptr<Service> service_;
};

TEST_F(ProcessPoisonTest, EndsOneRequestAndDisturbsNobody) {
  ASSERT_NE(service_, nullptr);
  Client& client = service_->client();
  constexpr int kBystanders = 3, kTokens = 150, kPoisoned = 30;
  std::vector<std::vector<int32_t>> alone;
  for (int i = 0; i < kBystanders; ++i) {
    const Generated generated = Generate(client, Ordinary(i, 20 + 30 * i, kTokens));
    ASSERT_TRUE(generated.status.ok()) << generated.status;
    ASSERT_EQ(generated.tokens.size(), static_cast<size_t>(kTokens));
    alone.push_back(generated.tokens);
  }
  std::vector<std::thread> bystanders;
  for (int i = 0; i < kBystanders; ++i) {
    bystanders.emplace_back([&, i] {
      const Generated generated = Generate(client, Ordinary(i, 20 + 30 * i, kTokens));
      EXPECT_TRUE(generated.status.ok()) << generated.status;
      EXPECT_EQ(generated.tokens, alone[i]) << "bystander " << i;
    });
  }
  // In the prompt, behind blocks that bystanders may share.
  for (int i = 0; i < kPoisoned; ++i) {
    v1::GenerateRequest request = Ordinary(i % kBystanders, 10 + 7 * (i % 10), 20);
    request.mutable_token_ids()->add_ids(kPoison);
    for (int t = 0; t < i % 4; ++t) request.mutable_token_ids()->add_ids(5);
    const Generated poisoned = Generate(client, request);
    EXPECT_EQ(poisoned.status.code(), absl::StatusCode::kDataLoss) << poisoned.status;
    EXPECT_THAT(poisoned.tokens, testing::IsEmpty());
  }
  // Chosen by itself: the token is told, the one after it cannot be.
  v1::GenerateRequest request = Ordinary(0, 40, 20);
  (*request.mutable_sampling()->mutable_logit_bias())[kPoison] = 100;
  const Generated poisoned = Generate(client, request);
  EXPECT_EQ(poisoned.status.code(), absl::StatusCode::kDataLoss) << poisoned.status;
  EXPECT_THAT(poisoned.tokens, testing::ElementsAre(kPoison));
  for (std::thread& bystander : bystanders) bystander.join();

  // Nothing is left, and whoever gets the blocks next finds them clean: together these fill all.
  const auto status = client.GetStatus();
  ASSERT_TRUE(status.ok()) << status.status();
  EXPECT_EQ(status->kv_blocks_used(), 0u);
  EXPECT_EQ(status->kv_blocks_cached() + status->kv_blocks_free(),
            static_cast<uint32_t>(kKvBlocks));
  std::vector<std::thread> heirs;
  for (int i = 0; i < kBystanders; ++i) {
    for (int copy = 0; copy < 3; ++copy) {
      heirs.emplace_back([&, i, copy] {
        v1::GenerateRequest again = Ordinary(i, 20 + 30 * i, kTokens);
        again.set_cache_salt(std::to_string(copy));
        const Generated generated = Generate(client, again);
        EXPECT_TRUE(generated.status.ok()) << generated.status;
        EXPECT_EQ(generated.tokens, alone[i]) << "heir " << i;
      });
    }
  }
  for (std::thread& heir : heirs) heir.join();
}

}  // namespace
}  // namespace stagecoach
