// Causal attention over tiles of 32 KV positions. Every tile starts fresh (its own maximum, sum and
// weighted values) and is merged into the running result in tile order, so a query's bits do not
// depend on the other queries. S: PortableSimd, Avx2Simd or Avx512Simd; value_length must be a
// multiple of S::kLanes if that is more than 8.
#ifndef STAGECOACH_KERNELS_CPU_ATTENTION_KERNEL_H_
#define STAGECOACH_KERNELS_CPU_ATTENTION_KERNEL_H_

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels/cpu/cpu_kernels.h"
#include "kernels/cpu/unpack.h"
#include "kernels/cpu/vector_kernels.h"

namespace stagecoach::cpu {

template <class S, KvFormat kFormat>
class TiledAttention {
 public:
  static void Run(const AttentionTask& task) {
    State states[kMaxTaskQueries];
    const int queries = task.rows * task.group;
    const int last_tile = (task.first_position + task.rows - 1) / kTilePositions;
    for (int tile = 0; tile <= last_tile; ++tile) {
      Tile kv(task, task.kv + task.blocks[tile] * task.block_stride);
      if (tile < last_tile) {
        const int left = task.first_position + task.rows - (tile + 1) * kTilePositions;
        kv.SetAhead(task, task.kv + task.blocks[tile + 1] * task.block_stride, left);
      } else {
        kv.SetAhead(task, task.next, kTilePositions);
      }
      // The first query that sees this tile.
      const int first_row = tile * kTilePositions - task.first_position;
      int i = first_row > 0 ? first_row * task.group : 0;
      for (; i + kMostQueries <= queries; i += kMostQueries) {
        RunQueries<kMostQueries>(task, i, tile, kv, states);
        kv.ahead = nullptr;  // fetched
      }
      if constexpr (kMostQueries > 2) {
        for (; i + 2 <= queries; i += 2) {
          RunQueries<2>(task, i, tile, kv, states);
          kv.ahead = nullptr;
        }
      }
      if (i < queries) RunQueries<1>(task, i, tile, kv, states);
    }
    for (int i = 0; i < queries; ++i) Finish(task, Out(task, i), states[i].sum);
  }

 private:
  using Floats = typename S::Floats;
  using Element =
      std::conditional_t<kFormat == KvFormat::kHalf, uint16_t,
                         std::conditional_t<kFormat == KvFormat::kFloat, float, uint8_t>>;
  static constexpr bool kQuants = kFormat == KvFormat::kQuant;
  static constexpr int kRun = 32;  // values that share a scale
  static constexpr int kLanes = S::kLanes;
  static constexpr ptrdiff_t kLine = 64;  // bytes
  static constexpr int kTileVectors = kTilePositions / kLanes;
  // Queries that share the loads of keys and values: as many as leave their sums in registers.
  static constexpr int kMostQueries = kLanes == 8 ? 2 : 4;

  static ptrdiff_t ValueStride(const AttentionTask& task) {
    return (task.value_length + 7) / 8 * 8;
  }

  // The parts of one block of KV; see KvFormat.
  struct Tile {
    Tile(const AttentionTask& task, const std::byte* at)
        : keys(reinterpret_cast<const Element*>(at)),
          values(keys + static_cast<ptrdiff_t>(task.key_length) * kTilePositions) {
      if constexpr (kQuants) {
        key_scales = reinterpret_cast<const uint16_t*>(values);
        const ptrdiff_t runs = (task.key_length + kRun - 1) / kRun;
        values = reinterpret_cast<const Element*>(key_scales + runs * kTilePositions);
        value_scales =
            reinterpret_cast<const uint16_t*>(values + ValueStride(task) * kTilePositions);
      }
    }
    // The tile at `at` (or null), of which `visible` positions count, is fetched while the keys of
    // this one are read: with each dim a few cache lines.
    void SetAhead(const AttentionTask& task, const std::byte* at, int visible) {
      const ptrdiff_t values =
          ValueStride(task) * (visible < kTilePositions ? visible : kTilePositions);
      ahead = at;
      ahead_bytes = (task.key_length * kTilePositions + values) * sizeof(Element);
      ahead_step = (ahead_bytes / task.key_length + kLine - 1) / kLine * kLine;
    }
    const Element* keys;
    const Element* values;
    const uint16_t* key_scales = nullptr;
    const uint16_t* value_scales = nullptr;
    const std::byte* ahead = nullptr;
    ptrdiff_t ahead_bytes = 0, ahead_step = 0;
  };

  struct State {
    float max;
    float sum;
  };

  static Floats LoadElements(const Element* p) {
    if constexpr (kFormat == KvFormat::kHalf) {
      return S::LoadHalf(p);
    } else if constexpr (kFormat == KvFormat::kFloat) {
      return S::Load(p);
    } else {
      return S::FloatsFromSigned(p);
    }
  }
  static float* Out(const AttentionTask& task, int query) {
    return task.out + query / task.group * task.out_stride +
           static_cast<ptrdiff_t>(query % task.group) * task.value_length;
  }

  template <int kQueries, int kVectors>
  static void SetZero(Floats (*sums)[kVectors]) {
    STAGECOACH_UNROLL
    for (int t = 0; t < kQueries; ++t) {
      STAGECOACH_UNROLL
      for (int i = 0; i < kVectors; ++i) sums[t][i] = S::Set(0);
    }
  }

  // sums += q . k over the dims [first, last) of the keys, for the first positions of the tile.
  template <int kQueries, int kVectors>
  static void DotKeys(const float* const* q, const Tile& kv, int first, int last,
                      Floats (*sums)[kVectors]) {
    const Element* keys = kv.keys + static_cast<ptrdiff_t>(first) * kTilePositions;
    for (int d = first; d < last; ++d, keys += kTilePositions) {
      if (kv.ahead != nullptr) {
        const ptrdiff_t end = (d + 1) * kv.ahead_step;
        for (ptrdiff_t i = d * kv.ahead_step; i < end && i < kv.ahead_bytes; i += kLine) {
          __builtin_prefetch(kv.ahead + i);
        }
      }
      STAGECOACH_UNROLL
      for (int i = 0; i < kVectors; ++i) {
        const Floats k = LoadElements(keys + kLanes * i);
        STAGECOACH_UNROLL
        for (int t = 0; t < kQueries; ++t) {
          sums[t][i] = S::Add(sums[t][i], S::Mul(S::Set(q[t][d]), k));
        }
      }
    }
  }

  // Scores of kQueries queries against the first kVectors * kLanes positions, scaled.
  template <int kQueries, int kVectors>
  static void Scores(const AttentionTask& task, const float* const* q, const Tile& kv,
                     float (*scores)[kTilePositions]) {
    Floats sums[kQueries][kVectors];
    SetZero<kQueries, kVectors>(sums);
    if constexpr (!kQuants) {
      DotKeys<kQueries, kVectors>(q, kv, 0, task.key_length, sums);
    } else {
      for (int first = 0; first < task.key_length; first += kRun) {
        Floats run[kQueries][kVectors];
        SetZero<kQueries, kVectors>(run);
        const int last = first + kRun < task.key_length ? first + kRun : task.key_length;
        DotKeys<kQueries, kVectors>(q, kv, first, last, run);
        const uint16_t* scales = kv.key_scales + first / kRun * kTilePositions;
        STAGECOACH_UNROLL
        for (int i = 0; i < kVectors; ++i) {
          const Floats scale = S::LoadHalf(scales + kLanes * i);
          STAGECOACH_UNROLL
          for (int t = 0; t < kQueries; ++t) {
            sums[t][i] = S::Add(sums[t][i], S::Mul(run[t][i], scale));
          }
        }
      }
    }
    STAGECOACH_UNROLL
    for (int t = 0; t < kQueries; ++t) {
      STAGECOACH_UNROLL
      for (int i = 0; i < kVectors; ++i) {
        S::Store(S::Mul(sums[t][i], S::Set(task.scale)), scores[t] + kLanes * i);
      }
    }
  }

  // The same for the positions below `visible`, and maybe more.
  template <int kQueries>
  static void VisibleScores(const AttentionTask& task, const float* const* q, const Tile& kv,
                            int visible, float (*scores)[kTilePositions]) {
    switch ((visible + kLanes - 1) / kLanes) {
      case 1:
        return Scores<kQueries, 1>(task, q, kv, scores);
      case 2:
        return Scores<kQueries, 2>(task, q, kv, scores);
      default:
        return Scores<kQueries, kTileVectors>(task, q, kv, scores);
    }
  }

  // Scores become weights e^(score - max), 0 from `visible` on. Returns max and sum of the tile.
  static State Softmax(float* scores, int visible) {
    for (int i = visible; i < kTilePositions; ++i) scores[i] = scores[0];
    Floats most = S::Max(S::Load(scores), S::Load(scores + 16));
    if constexpr (kLanes == 8) {
      most = S::Max(most, S::Max(S::Load(scores + 8), S::Load(scores + 24)));
    }
    float lanes[kLanes];
    S::Store(most, lanes);
    float max = lanes[0];
    for (int i = 1; i < kLanes; ++i) max = lanes[i] > max ? lanes[i] : max;
    for (int i = 0; i < kTilePositions; i += kLanes) {
      S::Store(Exp<S>(S::Sub(S::Load(scores + i), S::Set(max))), scores + i);
    }
    for (int i = visible; i < kTilePositions; ++i) scores[i] = 0;
    Floats sum = S::Add(S::Load(scores), S::Load(scores + 16));
    if constexpr (kLanes == 8) {
      sum = S::Add(sum, S::Add(S::Load(scores + 8), S::Load(scores + 24)));
    }
    return {max, S::Sum(sum)};
  }

  // acc += weight * value at a position, for kQueries queries from `first` on.
  template <int kQueries, int kVectors>
  static void AddPosition(const Element* values, const float (*weights)[kTilePositions], int first,
                          int position, Floats (*acc)[kVectors]) {
    STAGECOACH_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      const Floats v = LoadElements(values + kLanes * i);
      STAGECOACH_UNROLL
      for (int t = 0; t < kQueries; ++t) {
        acc[first + t][i] =
            S::Add(acc[first + t][i], S::Mul(S::Set(weights[first + t][position]), v));
      }
    }
  }

  // out = out * keep + tile * add for kLanes * kVectors values (`count` of them real).
  template <int kQueries, int kVectors>
  static void Values(const AttentionTask& task, const Tile& kv, int column, int count,
                     const int* visible, const float (*weights)[kTilePositions], bool first_tile,
                     const float* keep, const float* add, float* const* out) {
    const ptrdiff_t stride = ValueStride(task);
    float scaled[kQueries][kTilePositions];
    if constexpr (kQuants) {
      const uint16_t* scales = kv.value_scales + column / kRun * kTilePositions;
      for (int t = 0; t < kQueries; ++t) {
        for (int i = 0; i < kTilePositions; i += kLanes) {
          S::Store(S::Mul(S::Load(weights[t] + i), S::LoadHalf(scales + i)), scaled[t] + i);
        }
      }
      weights = scaled;
    }
    Floats acc[kQueries][kVectors];
    SetZero<kQueries, kVectors>(acc);
    const Element* values = kv.values + column;
    for (int p = 0; p < visible[0]; ++p) {
      AddPosition<kQueries, kVectors>(values + p * stride, weights, 0, p, acc);
    }
    STAGECOACH_UNROLL
    for (int t = 1; t < kQueries; ++t) {  // may be of a later row
      for (int p = visible[0]; p < visible[t]; ++p) {
        AddPosition<1, kVectors>(values + p * stride, weights, t, p, acc);
      }
    }
    STAGECOACH_UNROLL
    for (int t = 0; t < kQueries; ++t) {
      STAGECOACH_UNROLL
      for (int i = 0; i < kVectors; ++i) {
        Merge(acc[t][i], count - kLanes * i, first_tile, keep[t], add[t],
              out[t] + column + kLanes * i);
      }
    }
  }

  static void Merge(Floats tile, int count, bool first_tile, float keep, float add, float* out) {
    if (count >= kLanes) {
      const Floats old = first_tile ? S::Set(0) : S::Load(out);
      S::Store(S::Add(S::Mul(old, S::Set(keep)), S::Mul(tile, S::Set(add))), out);
      return;
    }
    float buffer[kLanes];
    S::Store(tile, buffer);
    for (int i = 0; i < count; ++i) {
      out[i] = (first_tile ? 0.0f : out[i]) * keep + buffer[i] * add;
    }
  }

  template <int kQueries>
  static void RunQueries(const AttentionTask& task, int first, int tile, const Tile& kv,
                         State* states) {
    const float* q[kQueries];
    float* out[kQueries];
    int visible[kQueries];
    float scores[kQueries][kTilePositions];
    float keep[kQueries], add[kQueries];
    for (int t = 0; t < kQueries; ++t) {
      const int row = (first + t) / task.group;
      q[t] = task.q + row * task.q_stride +
             static_cast<ptrdiff_t>((first + t) % task.group) * task.key_length;
      out[t] = Out(task, first + t);
      const int left = task.first_position + row + 1 - tile * kTilePositions;
      visible[t] = left < kTilePositions ? left : kTilePositions;
    }
    VisibleScores<kQueries>(task, q, kv, visible[kQueries - 1], scores);
    for (int t = 0; t < kQueries; ++t) {
      const State now = Softmax(scores[t], visible[t]);
      State& state = states[first + t];
      if (tile == 0) {
        state = now;
        keep[t] = 0;
        add[t] = 1;
        continue;
      }
      const float max = now.max > state.max ? now.max : state.max;
      keep[t] = ExpOne<S>(state.max - max);
      add[t] = ExpOne<S>(now.max - max);
      state = {max, state.sum * keep[t] + now.sum * add[t]};
    }
    int column = 0;
    for (; column + 32 <= task.value_length; column += 32) {
      Values<kQueries, 32 / kLanes>(task, kv, column, 32, visible, scores, tile == 0, keep, add,
                                    out);
    }
    for (; column < task.value_length; column += kLanes) {
      Values<kQueries, 1>(task, kv, column, task.value_length - column, visible, scores, tile == 0,
                          keep, add, out);
    }
  }

  static void Finish(const AttentionTask& task, float* out, float sum) {
    const float inverse = 1.0f / sum;
    for (int i = 0; i < task.value_length; ++i) out[i] *= inverse;
  }
};

template <class S>
void Attention(const AttentionTask& task) {
  switch (task.format) {
    case KvFormat::kHalf:
      return TiledAttention<S, KvFormat::kHalf>::Run(task);
    case KvFormat::kFloat:
      return TiledAttention<S, KvFormat::kFloat>::Run(task);
    case KvFormat::kQuant:
      return TiledAttention<S, KvFormat::kQuant>::Run(task);
  }
}

}  // namespace stagecoach::cpu

#endif  // STAGECOACH_KERNELS_CPU_ATTENTION_KERNEL_H_
