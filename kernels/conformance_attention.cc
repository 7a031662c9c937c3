#include <algorithm>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "fmt/format.h"
#include "kernels/conformance_case.h"
#include "kernels/random_tensor.h"
#include "model/status_macros.h"

namespace stagecoach {
namespace {

struct HeadShape {
  int heads;
  int kv_heads;
  int key_length;
  int value_length;
};
constexpr HeadShape kHeadShapes[] = {{4, 4, 64, 64},  {8, 2, 64, 64},    {4, 1, 128, 128},
                                     {6, 2, 80, 80},  {4, 2, 96, 64},    {2, 1, 64, 128},
                                     {16, 4, 32, 32}, {12, 4, 128, 128}, {3, 1, 256, 256}};

// One sequence of a step: `prior` positions are in the KV, `rows` follow.
struct SequenceRows {
  int prior;
  int rows;
};

struct StepCase {
  const char* name;
  std::vector<SequenceRows> sequences;
};
const std::vector<StepCase>& StepCases() {
  static const auto& cases = *new std::vector<StepCase>{
      {"first token", {{0, 1}}},
      {"decode at 31", {{31, 1}}},
      {"decode at 32", {{32, 1}}},
      {"decode at 200", {{200, 1}}},
      {"prompt of 40", {{0, 40}}},
      {"chunk over a tile edge", {{29, 7}}},
      {"chunk over three tiles", {{17, 70}}},
      {"decode of 5 sequences", {{0, 1}, {31, 1}, {32, 1}, {63, 1}, {130, 1}}},
      {"prompts among decodes", {{0, 5}, {31, 1}, {64, 3}, {200, 1}, {0, 33}}},
  };
  return cases;
}

// Decodes far into a context, where many parts of it are put together, in one way or another.
constexpr int kLongContexts[] = {300, 600, 1100};

constexpr int kMostPositions = 256;  // of the cases above
constexpr int kMostSequences = 5;
constexpr int kKvLayers = 2;

// What a sequence needs at most, in whole blocks.
int PositionsFor(std::span<const SequenceRows> sequences) {
  int most = kMostPositions;
  for (const SequenceRows& rows : sequences) most = std::max(most, rows.prior + rows.rows);
  return (most + kKvBlockPositions - 1) / kKvBlockPositions * kKvBlockPositions;
}

// Keys, values and queries of several sequences, by position; blocks dealt out in random order.
class AttentionBench {
 public:
  // positions: of each sequence, whole blocks.
  AttentionBench(Backend& backend, const HeadShape& shape, KvType type, double query_stddev,
                 int positions, uint64_t block_seed, int kv_layer = kKvLayers - 1)
      : backend_(backend), shape_(shape), type_(type), positions_(positions), kv_layer_(kv_layer) {
    params_.heads = shape.heads;
    params_.kv_heads = shape.kv_heads;
    params_.key_length = shape.key_length;
    params_.value_length = shape.value_length;
    params_.d_model = shape.heads * shape.value_length;
    params_.rope_dims = shape.key_length;
    RandomSource random(shape.heads * 131 + shape.key_length);
    for (int i = 0; i < kMostSequences; ++i) {
      q_.push_back(RandomFloats(random, Floats(QueryRow()), query_stddev));
      k_.push_back(RandomFloats(random, Floats(KeyRow())));
      v_.push_back(RandomFloats(random, Floats(ValueRow())));
    }
    ShuffleBlocks(block_seed);
  }

  absl::Status Open() {
    STAGECOACH_ASSIGN_OR_RETURN(kv_, backend_.NewKvCache({.layers = kKvLayers,
                                                          .kv_heads = shape_.kv_heads,
                                                          .key_length = shape_.key_length,
                                                          .value_length = shape_.value_length,
                                                          .blocks = 2 * Blocks(),
                                                          .type = type_}));
    return absl::OkStatus();
  }

  // Attention of one step in which sequence i has the rows sequences[i] (left out if it has none).
  // Returns [rows][heads][value_length].
  absl::StatusOr<std::vector<float>> Step(std::span<const SequenceRows> sequences) {
    std::vector<BatchSequence> batch;
    std::vector<float> q, k, v;
    int rows = 0;
    for (size_t i = 0; i < sequences.size(); ++i) {
      const int prior = sequences[i].prior, count = sequences[i].rows;
      if (count == 0) continue;
      batch.push_back(
          {.first_row = rows, .row_count = count, .start_position = prior, .blocks = blocks_[i]});
      const auto append = [&](std::vector<float>& to, const std::vector<float>& from, int row) {
        to.insert(to.end(), from.begin() + ptrdiff_t{prior} * row,
                  from.begin() + ptrdiff_t{prior + count} * row);
      };
      append(q, q_[i], QueryRow());
      append(k, k_[i], KeyRow());
      append(v, v_[i], ValueRow());
      rows += count;
    }
    std::vector<float> out(static_cast<size_t>(rows) * shape_.heads * shape_.value_length,
                           std::numeric_limits<float>::quiet_NaN());
    STAGECOACH_RETURN_IF_ERROR(backend_.Attention(params_, q, k, v, *kv_, kv_layer_,
                                                  {.sequences = batch, .rows = rows}, out));
    return out;
  }

  // Stores the first `prior` positions of every sequence, one sequence at a time.
  absl::Status Fill(std::span<const SequenceRows> sequences) {
    for (size_t i = 0; i < sequences.size(); ++i) {
      if (sequences[i].prior == 0) continue;
      std::vector<SequenceRows> one(i + 1, SequenceRows{0, 0});
      one[i] = {0, sequences[i].prior};
      STAGECOACH_RETURN_IF_ERROR(Step(one).status());
    }
    return absl::OkStatus();
  }

  // Leaves NaN in every block, as a sequence with broken activations would.
  absl::Status Poison() { return FillWith(std::numeric_limits<float>::quiet_NaN()); }

  // Copies every block to another place, where the sequences find it; the old one gets NaN.
  absl::Status MoveBlocks() {
    std::vector<KvBlockCopy> copies;
    for (const std::vector<int32_t>& blocks : blocks_) {
      for (const int32_t block : blocks) copies.push_back({block, block + Blocks()});
    }
    STAGECOACH_RETURN_IF_ERROR(backend_.CopyKvBlocks(*kv_, copies));
    STAGECOACH_RETURN_IF_ERROR(Poison());
    for (std::vector<int32_t>& blocks : blocks_) {
      for (int32_t& block : blocks) block += Blocks();
    }
    return absl::OkStatus();
  }

  // Two ways to zeros everywhere.
  absl::Status StoreZeros() { return FillWith(0); }
  absl::Status ClearAll() {
    STAGECOACH_RETURN_IF_ERROR(Poison());
    std::vector<int32_t> all;
    for (const std::vector<int32_t>& blocks : blocks_) {
      all.insert(all.end(), blocks.begin(), blocks.end());
    }
    return backend_.ClearKvBlocks(*kv_, all);
  }

 private:
  int QueryRow() const { return shape_.heads * shape_.key_length; }
  int KeyRow() const { return shape_.kv_heads * shape_.key_length; }
  int ValueRow() const { return shape_.kv_heads * shape_.value_length; }
  size_t Floats(int row) const { return static_cast<size_t>(positions_) * row; }
  int Blocks() const { return kMostSequences * positions_ / kKvBlockPositions; }

  // All positions of all sequences get keys and values of `value`.
  absl::Status FillWith(float value) {
    const std::vector<std::vector<float>> k = k_, v = v_;
    for (auto* rows : {&k_, &v_}) {
      for (std::vector<float>& row : *rows) std::fill(row.begin(), row.end(), value);
    }
    const std::vector<SequenceRows> all(kMostSequences, {positions_, 0});
    const absl::Status status = Fill(all);
    k_ = k;
    v_ = v;
    return status;
  }

  void ShuffleBlocks(uint64_t seed) {
    std::vector<int32_t> order(Blocks());
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int32_t>(i);
    RandomSource random(seed);
    for (size_t i = order.size() - 1; i > 0; --i) std::swap(order[i], order[random.Next() % i]);
    const int each = positions_ / kKvBlockPositions;
    for (int i = 0; i < kMostSequences; ++i) {
      blocks_.emplace_back(order.begin() + i * each, order.begin() + (i + 1) * each);
    }
  }

  Backend& backend_;
  const HeadShape shape_;
  const KvType type_;
  const int positions_;
  const int kv_layer_;
  ModelParams params_;
  std::unique_ptr<KvCache> kv_;
  std::vector<std::vector<float>> q_, k_, v_;  // [kMostSequences][positions_ * row]
  std::vector<std::vector<int32_t>> blocks_;   // [kMostSequences][blocks]
};

struct AttentionCase {
  HeadShape shape;
  KvType type;
  double query_stddev = 1;  // larger: a few positions take all the weight
};

// What is done to the cache before and after the sequences' earlier positions are stored.
using BenchAction = absl::Status (AttentionBench::*)();
struct Around {
  BenchAction before = nullptr;
  BenchAction after = nullptr;
  int kv_layer = kKvLayers - 1;
};

ConformanceRun RunStep(AttentionCase test, std::vector<SequenceRows> sequences, uint64_t block_seed,
                       Around around = {}) {
  return [=](Backend& backend) -> absl::StatusOr<std::vector<float>> {
    AttentionBench bench(backend, test.shape, test.type, test.query_stddev, PositionsFor(sequences),
                         block_seed, around.kv_layer);
    STAGECOACH_RETURN_IF_ERROR(bench.Open());
    if (around.before != nullptr) STAGECOACH_RETURN_IF_ERROR((bench.*around.before)());
    STAGECOACH_RETURN_IF_ERROR(bench.Fill(sequences));
    if (around.after != nullptr) STAGECOACH_RETURN_IF_ERROR((bench.*around.after)());
    return bench.Step(sequences);
  };
}

// The same rows as RunStep: each sequence by itself, in chunks of the given sizes in turn.
ConformanceRun RunChunks(AttentionCase test, std::vector<SequenceRows> sequences,
                         std::vector<int> chunk_sizes) {
  return [=](Backend& backend) -> absl::StatusOr<std::vector<float>> {
    AttentionBench bench(backend, test.shape, test.type, test.query_stddev, PositionsFor(sequences),
                         /*block_seed=*/77);
    STAGECOACH_RETURN_IF_ERROR(bench.Open());
    std::vector<float> all;
    size_t next_size = 0;
    for (size_t i = 0; i < sequences.size(); ++i) {
      const int end = sequences[i].prior + sequences[i].rows;
      for (int position = 0; position < end;) {
        // Chunks before the rows asked for end where those begin.
        const int limit = position < sequences[i].prior ? sequences[i].prior : end;
        const int rows = std::min(chunk_sizes[next_size++ % chunk_sizes.size()], limit - position);
        std::vector<SequenceRows> one(i + 1, SequenceRows{0, 0});
        one[i] = {position, rows};
        STAGECOACH_ASSIGN_OR_RETURN(const std::vector<float> part, bench.Step(one));
        if (position >= sequences[i].prior) all.insert(all.end(), part.begin(), part.end());
        position += rows;
      }
    }
    return all;
  };
}

}  // namespace

const char* KvTypeName(KvType type) {
  switch (type) {
    case KvType::kF16:
      return "F16";
    case KvType::kF32:
      return "F32";
    case KvType::kQ8_0:
      return "Q8_0";
  }
  return "";
}

double AttentionTolerance(KvType type) {
  switch (type) {
    case KvType::kF16:
      return 1e-3;
    case KvType::kF32:
      return 1e-5;
    case KvType::kQ8_0:
      return 2e-2;
  }
  return 0;
}

std::vector<ConformanceCase> AttentionCases() {
  std::vector<ConformanceCase> cases;
  for (const HeadShape& shape : kHeadShapes) {
    for (const KvType type : {KvType::kF16, KvType::kF32, KvType::kQ8_0}) {
      const std::string prefix =
          fmt::format("Attention/heads={},kv={},key={},value={}/KV {}/", shape.heads,
                      shape.kv_heads, shape.key_length, shape.value_length, KvTypeName(type));
      const double tolerance = AttentionTolerance(type);
      const auto add_near = [&](const std::string& name, const AttentionCase& test,
                                const std::vector<SequenceRows>& sequences, double allowed) {
        cases.push_back(
            {.name = prefix + name, .run = RunStep(test, sequences, 1), .tolerance = allowed});
      };
      const auto add_same = [&](const std::string& name, ConformanceRun run, ConformanceRun other) {
        cases.push_back(
            {.name = prefix + name, .run = std::move(run), .same_bits_as = std::move(other)});
      };
      for (const StepCase& step : StepCases()) {
        add_near(step.name, {shape, type}, step.sequences, tolerance);
      }
      add_near("peaked weights", {shape, type, 8}, {{64, 40}}, 10 * tolerance);

      const std::vector<SequenceRows>& mixed = StepCases().back().sequences;
      const AttentionCase plain = {shape, type};
      const ConformanceRun whole = RunStep(plain, mixed, 1);
      add_same("sequence alone", whole, RunChunks(plain, mixed, {kMostPositions}));
      add_same("chunks of 1", whole, RunChunks(plain, mixed, {1}));
      add_same("chunks of 7 and 64", whole, RunChunks(plain, mixed, {7, 64}));
      add_same("other blocks", whole, RunStep(plain, mixed, 2));
      add_same("blocks that held NaN", RunStep(plain, mixed, 1, {&AttentionBench::Poison}), whole);
      const bool few_heads = shape.kv_heads <= 2 && shape.key_length <= 128;
      if (type == KvType::kF16 && few_heads && shape.key_length % 64 == 0) {  // the rest is slow
        for (const int context : kLongContexts) {
          const std::vector<SequenceRows> decodes = {{context, 1}, {40, 1}, {context / 2, 1}};
          const std::string name = fmt::format("decodes after {}", context);
          add_near(name, plain, decodes, tolerance);
          add_same(name + " alone", RunStep(plain, decodes, 1),
                   RunChunks(plain, decodes, {context}));
        }
      }
      // Whole blocks are copied and cleared: an even and a ragged shape are enough.
      const bool whole_blocks = shape.key_length == 64 || shape.key_length == 80;
      for (int layer = 0; layer < kKvLayers && whole_blocks && shape.heads <= 6; ++layer) {
        const std::string suffix = fmt::format(", layer {}", layer);
        const Around moved = {nullptr, &AttentionBench::MoveBlocks, layer};
        add_same("copied blocks" + suffix, RunStep(plain, mixed, 1, moved), whole);
        const Around cleared = {nullptr, &AttentionBench::ClearAll, layer};
        const Around zeros = {nullptr, &AttentionBench::StoreZeros, layer};
        add_same("cleared blocks" + suffix, RunStep(plain, mixed, 1, cleared),
                 RunStep(plain, mixed, 1, zeros));
      }
    }
  }
  return cases;
}

}  // namespace stagecoach
