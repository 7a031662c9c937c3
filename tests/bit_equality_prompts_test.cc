// The numerics contract over many random prompts: each one alone, in random batches, in random
// chunks, behind a cached prefix and replayed after a preemption gives the same logits, bit for
// bit.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "model/test_paths.h"
#include "tests/stage_chain.h"

namespace stagecoach {
namespace {

constexpr int kPrompts = 200;
constexpr int kMaxPrompt = 100;
constexpr int kMaxBatch = 32;
constexpr int kFirstOrdinaryToken = 3;

class BitEqualityPromptsTest : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    auto chain =
        StageChain::Create(TestDataPath(GetParam()), {.stages = 2, .max_slots = kMaxBatch + 1});
    ASSERT_TRUE(chain.ok()) << chain.status();
    chain_ = *std::move(chain);
    vocab_ = chain_->model().params().vocab_size;
    for (int i = 0; i < kPrompts; ++i) prompts_.push_back(RandomPrompt());
    for (const TokenList& prompt : prompts_) {
      const int slot = chain_->Open();
      std::vector<float> logits;
      Extend(slot, prompt, 0, prompt.size(), logits);
      chain_->Close(slot);
      ASSERT_EQ(logits.size(), prompt.size() * vocab_);
      alone_.push_back(std::move(logits));
    }
  }

  size_t Pick(size_t low, size_t high) { return low + random_() % (high - low + 1); }

  TokenList RandomPrompt() {
    TokenList prompt(Pick(1, kMaxPrompt));
    for (int32_t& token : prompt) {
      token = static_cast<int32_t>(Pick(kFirstOrdinaryToken, vocab_ - 1));
    }
    return prompt;
  }

  // Tokens [first, last) of `tokens`, which follow those of the slot, in one step.
  void Extend(int slot, const TokenList& tokens, size_t first, size_t last,
              std::vector<float>& logits) {
    auto step = chain_->Step({{slot, {tokens.begin() + first, tokens.begin() + last}}});
    ASSERT_TRUE(step.ok()) << step.status();
    logits.insert(logits.end(), (*step)[0].begin(), (*step)[0].end());
  }

  // The rest of the tokens from `first` on, in random chunks.
  std::vector<float> InChunks(int slot, const TokenList& tokens, size_t first) {
    std::vector<float> logits;
    while (first < tokens.size()) {
      const size_t last = std::min(tokens.size(), first + Pick(1, 40));
      Extend(slot, tokens, first, last, logits);
      first = last;
    }
    return logits;
  }

  // A stranger takes the blocks that have become free, and gives them back.
  void Disturb() {
    const int slot = chain_->Open();
    InChunks(slot, RandomPrompt(), 0);
    chain_->Close(slot);
  }

  // Counts prompts whose logits from position `first` on are those of the prompt alone.
  void Compare(int prompt, size_t first, const std::vector<float>& logits) {
    ASSERT_EQ(logits.size() + first * vocab_, alone_[prompt].size()) << "prompt " << prompt;
    const bool same = std::memcmp(logits.data(), alone_[prompt].data() + first * vocab_,
                                  logits.size() * sizeof(float)) == 0;
    EXPECT_TRUE(same) << "prompt " << prompt << " from position " << first;
    equal_ += same;
  }

  std::mt19937_64 random_{20};
  std::unique_ptr<StageChain> chain_;
  size_t vocab_ = 0;
  std::vector<TokenList> prompts_;
  std::vector<std::vector<float>> alone_;
  int equal_ = 0;
};

// Sequences of a random batch begin, go on and end at different steps.
TEST_P(BitEqualityPromptsTest, InRandomBatches) {
  struct Running {
    int prompt = 0, slot = 0;
    size_t sent = 0, next = 0;
    std::vector<float> logits;
  };
  std::vector<Running> running;
  int begun = 0;
  size_t largest = 0;
  while (begun < kPrompts || !running.empty()) {
    const size_t wanted = Pick(1, kMaxBatch);
    while (begun < kPrompts && running.size() < wanted) {
      running.push_back({.prompt = begun++, .slot = chain_->Open()});
    }
    std::shuffle(running.begin(), running.end(), random_);
    largest = std::max(largest, running.size());
    std::vector<ChainRows> rows;
    for (Running& r : running) {
      const TokenList& tokens = prompts_[r.prompt];
      r.next = std::min(tokens.size(), r.sent + Pick(1, 16));
      rows.push_back({r.slot, {tokens.begin() + r.sent, tokens.begin() + r.next}});
    }
    auto step = chain_->Step(rows);
    ASSERT_TRUE(step.ok()) << step.status();
    for (size_t i = 0; i < running.size(); ++i) {
      Running& r = running[i];
      r.logits.insert(r.logits.end(), (*step)[i].begin(), (*step)[i].end());
      r.sent = r.next;
      if (r.sent < prompts_[r.prompt].size()) continue;
      Compare(r.prompt, 0, r.logits);
      chain_->Close(r.slot);
    }
    std::erase_if(running, [&](const Running& r) { return r.sent == prompts_[r.prompt].size(); });
  }
  EXPECT_EQ(equal_, kPrompts);
  EXPECT_EQ(largest, static_cast<size_t>(kMaxBatch));
}

TEST_P(BitEqualityPromptsTest, InRandomChunks) {
  for (int i = 0; i < kPrompts; ++i) {
    const int slot = chain_->Open();
    Compare(i, 0, InChunks(slot, prompts_[i], 0));
    chain_->Close(slot);
  }
  EXPECT_EQ(equal_, kPrompts);
}

// The beginning was computed by a sequence that has ended: whole blocks of it are shared, the one
// partly filled is copied.
TEST_P(BitEqualityPromptsTest, BehindACachedPrefix) {
  for (int i = 0; i < kPrompts; ++i) {
    const TokenList& prompt = prompts_[i];
    const size_t shared = prompt.size() > 32 && Pick(0, 1) ? 32 : Pick(0, prompt.size() - 1);
    TokenList cousin(prompt.begin(), prompt.begin() + shared);
    const TokenList other = RandomPrompt();
    cousin.insert(cousin.end(), other.begin(), other.end());
    const int parent = chain_->Open();
    InChunks(parent, cousin, 0);
    const int slot = chain_->Fork(parent, shared);
    chain_->Close(parent);
    Disturb();
    Compare(i, shared, InChunks(slot, prompt, shared));
    chain_->Close(slot);
  }
  EXPECT_EQ(equal_, kPrompts);
}

// Closed in the middle, its blocks lent to others, then replayed from the start.
TEST_P(BitEqualityPromptsTest, ReplayedAfterAPreemption) {
  for (int i = 0; i < kPrompts; ++i) {
    const TokenList& prompt = prompts_[i];
    const int first = chain_->Open();
    InChunks(first, {prompt.begin(), prompt.begin() + Pick(1, prompt.size())}, 0);
    chain_->Close(first);
    Disturb();
    const int stranger = chain_->Open();
    InChunks(stranger, RandomPrompt(), 0);
    const int slot = chain_->Open();
    Compare(i, 0, InChunks(slot, prompt, 0));
    chain_->Close(slot);
    chain_->Close(stranger);
  }
  EXPECT_EQ(equal_, kPrompts);
}

INSTANTIATE_TEST_SUITE_P(Models, BitEqualityPromptsTest,
                         testing::Values("demo2-Q4_K_S.gguf", "demo2-f16.gguf"),
                         [](const auto& info) {
                           return info.param.substr(6, info.param.find('.') - 6);
                         });

}  // namespace
}  // namespace stagecoach
