// The best logits found on the GPU are those of the logits themselves.
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include "kernels/cuda/cuda_test.h"
#include "kernels/random_tensor.h"
#include "kernels/sampling_units.h"

namespace stagecoach {
namespace {

constexpr int kRows = 70;  // more than go through the head at once

class CudaHead : public CudaTest {
 protected:
  void Open(int vocab) {
    params_.layers = 1;
    params_.d_model = 256;
    params_.heads = params_.kv_heads = 4;
    params_.key_length = params_.value_length = params_.rope_dims = 64;
    params_.ffn_length = 256;
    params_.vocab_size = vocab;
    params_.context_length = 64;
    params_.norm_epsilon = 1e-5f;
    RandomSource random(vocab);
    auto head = BuildUnit(
        *backend_, params_,
        MakeRandomUnit(random, params_, {Unit::Kind::kHead}, TensorType::kQ4_0, /*biases=*/false));
    ASSERT_TRUE(head.ok()) << head.status();
    head_ = *std::move(head);
    auto workspace = backend_->NewWorkspace(params_, kRows);
    ASSERT_TRUE(workspace.ok()) << workspace.status();
    workspace_ = *std::move(workspace);
    residual_ = RandomFloats(random, size_t{kRows} * params_.d_model);
  }

  // Compares the `count` best of every row, last row first.
  void ExpectTop(int count) {
    std::vector<int32_t> rows(kRows);
    std::iota(rows.rbegin(), rows.rend(), 0);
    const size_t vocab = params_.vocab_size;
    std::vector<float> logits(kRows * vocab);
    std::vector<TopLogit> top(size_t{kRows} * count);
    ASSERT_TRUE(backend_->SetResidual(*workspace_, residual_).ok());
    ASSERT_TRUE(backend_->Head(*workspace_, *head_, rows, logits).ok());
    std::vector<uint64_t> totals(kRows);
    ASSERT_TRUE(backend_->HeadTop(*workspace_, *head_, rows, count, top, totals).ok());
    for (int row = 0; row < kRows; ++row) {
      const auto of_row = std::span(logits).subspan(row * vocab, vocab);
      if (!std::isfinite(std::accumulate(of_row.begin(), of_row.end(), 0.0))) {
        EXPECT_TRUE(std::isnan(top[row * count].logit)) << row;
        continue;
      }
      const float best = std::ranges::max(of_row);
      uint64_t total = 0;
      for (const float logit : of_row) {
        total += SamplingUnits(portable_math_internal::kPowerTable.data(), logit, best, 1);
      }
      EXPECT_EQ(totals[row], total) << row;
      std::vector<int32_t> ids(vocab);
      std::iota(ids.begin(), ids.end(), 0);
      std::ranges::stable_sort(ids, std::greater<>(), [&](int32_t id) { return of_row[id]; });
      for (int i = 0; i < count; ++i) {
        const TopLogit& entry = top[row * count + i];
        ASSERT_EQ(entry.id, ids[i]) << "row " << row << ", place " << i;
        ASSERT_EQ(entry.logit, of_row[ids[i]]) << "row " << row << ", place " << i;
      }
    }
  }

  void ExpectDraws() {
    std::vector<int32_t> rows(kRows), tokens(kRows);
    std::iota(rows.rbegin(), rows.rend(), 0);
    const size_t vocab = params_.vocab_size;
    std::vector<float> logits(kRows * vocab);
    ASSERT_TRUE(backend_->SetResidual(*workspace_, residual_).ok());
    ASSERT_TRUE(backend_->Head(*workspace_, *head_, rows, logits).ok());
    for (const float temperature : {1e-3f, 0.8f, 1.0f, 30.0f}) {
      std::vector<SamplingParams> params;
      std::vector<TokenDraw> draws;
      for (int row = 0; row < kRows; ++row) {
        params.push_back({.temperature = temperature, .seed = static_cast<uint64_t>(row)});
        draws.push_back(*DrawAmongAll(params.back(), static_cast<int>(vocab), /*position=*/3));
      }
      ASSERT_TRUE(backend_->HeadDraw(*workspace_, *head_, rows, draws, tokens).ok());
      for (int row = 0; row < kRows; ++row) {
        const auto of_row = std::span(logits).subspan(row * vocab, vocab);
        const auto sampled = Sample(of_row, params[row], {}, 0, /*position=*/3);
        const bool finite = AllFinite(of_row);
        ASSERT_EQ(tokens[row], finite ? sampled.value().token_id : -1)
            << "row " << row << " of " << vocab << ", temperature " << temperature;
      }
    }
  }

  // The picks of every `step`-th row from `first` on, all greedy or every second one, by Sample.
  struct Picks {
    std::vector<int32_t> rows;
    std::vector<TokenDraw> draws;
    std::vector<int32_t> expected;
  };
  Picks MakePicks(int first, int step, uint64_t position, bool greedy = false) {
    Picks picks;
    for (int row = first; row < kRows; row += step) picks.rows.push_back(row);
    const size_t vocab = params_.vocab_size;
    std::vector<float> logits(picks.rows.size() * vocab);
    EXPECT_TRUE(backend_->SetResidual(*workspace_, residual_).ok());
    EXPECT_TRUE(backend_->Head(*workspace_, *head_, picks.rows, logits).ok());
    for (size_t i = 0; i < picks.rows.size(); ++i) {
      const SamplingParams params = {.temperature = greedy || i % 2 == 0 ? 0.0f : 0.8f, .seed = i};
      picks.draws.push_back(*DrawAmongAll(params, params_.vocab_size, position));
      const auto of_row = std::span(logits).subspan(i * vocab, vocab);
      const auto sampled = Sample(of_row, params, {}, 0, position);
      picks.expected.push_back(AllFinite(of_row) ? sampled.value().token_id : -1);
    }
    return picks;
  }

  void ExpectAwaited(const Picks& picks) {
    std::vector<int32_t> tokens(picks.rows.size());
    std::vector<uint8_t> finite(kRows);
    ASSERT_TRUE(backend_->AwaitEnd(*workspace_, tokens, finite).ok());
    EXPECT_EQ(tokens, picks.expected);
    for (int row = 0; row < kRows; ++row) {
      const size_t d_model = params_.d_model;
      EXPECT_EQ(finite[row], AllFinite(std::span(residual_).subspan(row * d_model, d_model)));
    }
  }

  // Of some rows, of all (and all but one: more than go through the head at once), also greedily
  // alone, two steps at a time with the device.
  void ExpectPicks() {
    const Picks some = MakePicks(1, 3, /*position=*/3), all = MakePicks(0, 1, 4);
    const Picks most = MakePicks(1, 1, /*position=*/5);
    const Picks greedy = MakePicks(1, 3, 6, /*greedy=*/true), all_greedy = MakePicks(0, 1, 7, true);
    const Picks* const steps[] = {&some, &all,        &greedy, &all, &most,
                                  &all,  &all_greedy, &greedy, &some};
    for (size_t i = 0; i < std::size(steps); ++i) {
      ASSERT_TRUE(backend_->SetResidual(*workspace_, residual_).ok());
      ASSERT_TRUE(
          backend_->EnqueuePicks(*workspace_, *head_, steps[i]->rows, steps[i]->draws).ok());
      if (i > 0) ExpectAwaited(*steps[i - 1]);
    }
    while (!backend_->EndReady(*workspace_)) {
    }
    ExpectAwaited(some);
  }

  ModelParams params_;
  std::unique_ptr<UnitWeights> head_;
  std::unique_ptr<Workspace> workspace_;
  std::vector<float> residual_;
};

TEST_F(CudaHead, TopOfSmallAndLargeVocabularies) {
  for (const int vocab : {7, 325, 4096, 32000, 300000}) {
    Open(vocab);
    for (const int count : {1, 5, 64, backend_->MaxTopLogits()}) {
      if (count <= vocab) ExpectTop(count);
    }
  }
}

// Few enough for run_gpu_tests.sh --sanitizers.
TEST_F(CudaHead, TopOfSmallVocabularies) {
  for (const int vocab : {325, 4500}) {
    Open(vocab);
    for (const int count : {1, std::min(vocab, backend_->MaxTopLogits())}) ExpectTop(count);
  }
}

// Many draws of each row: those of Sample from the logits themselves.
TEST_F(CudaHead, DrawsAreThoseOfTheHost) {
  for (const int vocab : {7, 325, 4096, 4097, 128256}) {
    Open(vocab);
    ExpectDraws();
  }
}

// As TopOfSmallVocabularies.
TEST_F(CudaHead, DrawsFromASmallVocabulary) {
  Open(4500);
  ExpectDraws();
}

TEST_F(CudaHead, PicksAreThoseOfTheHost) {
  for (const int vocab : {325, 4500, 128256}) {
    Open(vocab);
    ExpectPicks();
  }
}

// As TopOfSmallVocabularies.
TEST_F(CudaHead, PicksFromASmallVocabulary) {
  Open(325);
  ExpectPicks();
}

TEST_F(CudaHead, AStepGoesOnWithPicksThatNoHostHasSeen) {
  Open(325);
  RandomSource random(3);
  const auto embedding = BuildUnit(
      *backend_, params_,
      MakeRandomUnit(random, params_, {Unit::Kind::kEmbedding}, TensorType::kQ4_0, false));
  ASSERT_TRUE(embedding.ok()) << embedding.status();
  residual_[5 * params_.d_model] = std::numeric_limits<float>::quiet_NaN();
  for (const bool greedy : {false, true}) {
    const Picks picks = MakePicks(0, 1, /*position=*/3, greedy);
    ASSERT_TRUE(backend_->SetResidual(*workspace_, residual_).ok());
    ASSERT_TRUE(backend_->EnqueuePicks(*workspace_, *head_, picks.rows, picks.draws).ok());
    const int32_t ids[] = {PickOf(69), 17, PickOf(0), PickOf(5)};
    const int32_t known[] = {picks.expected[69], 17, picks.expected[0], 0};
    std::vector<float> rows(std::size(ids) * params_.d_model), expected = rows;
    ASSERT_TRUE(backend_->Embed(*workspace_, **embedding, ids).ok());
    ASSERT_TRUE(backend_->GetResidual(*workspace_, rows).ok());
    ASSERT_TRUE(backend_->Embed(*workspace_, **embedding, known).ok());
    ASSERT_TRUE(backend_->GetResidual(*workspace_, expected).ok());
    EXPECT_EQ(rows, expected);
    ExpectAwaited(picks);
  }
}

TEST_F(CudaHead, NonFiniteRowsShow) {
  Open(5000);
  residual_[3 * params_.d_model] = std::numeric_limits<float>::quiet_NaN();
  residual_[69 * params_.d_model + 5] = std::numeric_limits<float>::infinity();
  ExpectTop(2);
  ExpectDraws();
  ExpectPicks();
}

}  // namespace
}  // namespace stagecoach
