// y = x * w^T for packed weights, for one row or many, with the same sum for every row:
//
//   acc = 0; for each group g of 32 columns, in order:
//     acc += float(sum_h scale[h] * dot(quants, x_quants)[h]) * (delta * x_scale)
//            - min[0] * x_sum[0] (- min[1] * x_sum[1])
//
// where the integer part is exact. Float weights: four sums over the columns 4i, 4i + 1, 4i + 2,
// 4i + 3, joined as (0 + 2) + (1 + 3).
#ifndef STAGECOACH_KERNELS_CPU_MATMUL_KERNEL_H_
#define STAGECOACH_KERNELS_CPU_MATMUL_KERNEL_H_

#include <cstddef>
#include <cstdint>

#include "kernels/cpu/cpu_kernels.h"
#include "kernels/cpu/unpack.h"

namespace stagecoach::cpu {

// The panels of one vector of S, from `panel` on: S::kPanels of them, or the last one alone, whose
// rows the lanes of the second then repeat.
template <class S, class Record>
struct Strip {
  Strip(const MatrixView& w, int panel, int last_panel)
      : records(
            reinterpret_cast<const Record*>(w.data + static_cast<size_t>(panel) * w.panel_bytes)) {
    const int panels = panel + S::kPanels <= last_panel ? S::kPanels : 1;
    pitch = panels == 2 ? static_cast<ptrdiff_t>(w.panel_bytes) : 0;
    const int left = w.rows - panel * kPanelRows;
    outputs = left < panels * kPanelRows ? left : panels * kPanelRows;
  }

  // Writes the outputs.
  void Store(typename S::Floats value, bool accumulate, float* y) const {
    if (outputs == S::kLanes) {
      S::Store(accumulate ? S::Add(S::Load(y), value) : value, y);
      return;
    }
    float buffer[S::kLanes];
    S::Store(value, buffer);
    for (int i = 0; i < outputs; ++i) y[i] = accumulate ? y[i] + buffer[i] : buffer[i];
  }

  const Record* records;
  ptrdiff_t pitch;
  int outputs;
};

template <class S, class Record>
class QuantMatmul {
 public:
  static void Run(const MatrixView& w, int first_panel, int last_panel, const ActivationView& x,
                  bool accumulate, float* y, ptrdiff_t y_stride) {
    if (x.rows <= kDirectRows) {
      // Each panel for all rows, from memory the first time and from the cache after that.
      for (int panel = first_panel; panel < last_panel; panel += S::kPanels) {
        const Strip<S, Record> strip(w, panel, last_panel);
        for (int row = 0; row < x.rows; row += kFewRows) {
          RunFew<kFewRows>(strip, x, row, accumulate, y + panel * kPanelRows, y_stride);
        }
      }
      return;
    }
    for (int row = 0; row < x.rows; row += kSlabRows) {
      const int rows = x.rows - row < kSlabRows ? x.rows - row : kSlabRows;
      RunSlab(w, first_panel, last_panel, x, row, rows, accumulate, y, y_stride);
    }
  }

 private:
  using U = Unpack<S, Record>;
  using Bytes = typename S::Bytes;
  using Ints = typename S::Ints;
  using Floats = typename S::Floats;

  // Rows of a slab that share the loads of weights.
  static constexpr int kTileRows = 4;
  // Rows that share what is unpacked without being stored: as there are registers for.
  static constexpr int kFewRows = S::kByteDots ? 8 : 4;
  // A slab of rows is taken through all panels before the next, so that its activations stay in
  // the second-level cache; a chunk of a panel is unpacked once per slab.
  static constexpr int kSlabRows = 64;
  // Up to here unpacking again for every kFewRows rows costs less than storing what was unpacked.
  // Signed quants need no unpacking.
  static constexpr int kDirectRows = U::kSigned ? kSlabRows : S::kByteDots ? 16 : 8;
  // How far ahead of its use a weight is fetched. A record is read in several strands at once,
  // which the processor's own prefetching follows badly.
  static constexpr size_t kPrefetchBytes = 4096;
  static constexpr int kChunkGroups = 16;

  struct UnpackedGroup {
    Bytes weights[8];
    GroupScales<S> scales;
  };

  static void UnpackGroup(const Record& record, int group, ptrdiff_t pitch, UnpackedGroup* out) {
    Prefetch(record, group, 0);
    if constexpr (S::kPanels == 2) Prefetch(record, group, pitch);
    U::Weights(record, group, pitch, out->weights);
    U::Scales(record, group, pitch, &out->scales);
  }
  // Fetches what lies kPrefetchBytes behind a group.
  static void Prefetch(const Record& record, int group, ptrdiff_t pitch) {
    constexpr size_t kGroupBytes = sizeof(Record) / Record::kGroups;
    const uint8_t* ahead =
        reinterpret_cast<const uint8_t*>(&record) + pitch + group * kGroupBytes + kPrefetchBytes;
    for (size_t i = 0; i < kGroupBytes; i += 64) __builtin_prefetch(ahead + i);
  }

  // sum_h scale[h] * dot[h] of one group for kStrips strips and kRows rows, rounded to float.
  // groups: of the strips, `pitch` apart; quants: of the group, rows `stride` apart.
  template <int kStrips, int kRows>
  static void Dot(const UnpackedGroup* groups, ptrdiff_t pitch, const int8_t* quants,
                  ptrdiff_t stride, Floats (*sums)[kRows]) {
    if constexpr (S::kByteDots) {
      DotBytes<kStrips, kRows>(groups, pitch, quants, stride, sums);
    } else {
      Ints ints[kStrips][kRows];
      if constexpr (U::kSigned) {
        DotSigned<kStrips, kRows>(groups, pitch, quants, stride, ints);
      } else {
        DotUnsigned<kStrips, kRows>(groups, pitch, quants, stride, ints);
      }
      STAGECOACH_UNROLL
      for (int p = 0; p < kStrips; ++p) {
        STAGECOACH_UNROLL
        for (int t = 0; t < kRows; ++t) sums[p][t] = S::ToFloats(ints[p][t]);
      }
    }
  }

  // With products of bytes that are added to integers at once. The scaled sum of a half fits a
  // float, and so does the sum over both before it is rounded: the same bits as in integers.
  template <int kStrips, int kRows>
  static void DotBytes(const UnpackedGroup* groups, ptrdiff_t pitch, const int8_t* quants,
                       ptrdiff_t stride, Floats (*sums)[kRows]) {
    constexpr int kCount = 8 / U::kHalves;
    STAGECOACH_UNROLL
    for (int h = 0; h < U::kHalves; ++h) {
      Ints dot[kStrips][kRows];
      STAGECOACH_UNROLL
      for (int p = 0; p < kStrips; ++p) {
        STAGECOACH_UNROLL
        for (int t = 0; t < kRows; ++t) dot[p][t] = S::ZeroInts();
      }
      STAGECOACH_UNROLL
      for (int i = 0; i < kCount; ++i) {
        const int j = h * kCount + i;
        STAGECOACH_UNROLL
        for (int t = 0; t < kRows; ++t) {
          const Bytes x = S::Broadcast4(quants + t * stride + 4 * j);
          STAGECOACH_UNROLL
          for (int p = 0; p < kStrips; ++p) {
            const Bytes w = groups[p * pitch].weights[j];
            dot[p][t] = U::kSigned ? S::AddSignedDot(dot[p][t], w, x) : S::AddDot(dot[p][t], w, x);
          }
        }
      }
      STAGECOACH_UNROLL
      for (int p = 0; p < kStrips; ++p) {
        STAGECOACH_UNROLL
        for (int t = 0; t < kRows; ++t) {
          Floats sum = S::ToFloats(dot[p][t]);
          if constexpr (!U::kUnitScale) sum = S::Mul(sum, groups[p * pitch].scales.scale[h]);
          sums[p][t] = h == 0 ? sum : S::Add(sums[p][t], sum);
        }
      }
    }
  }

  // With products of neighbouring bytes, added in 16 bits.
  template <int kStrips, int kRows>
  static void DotUnsigned(const UnpackedGroup* groups, ptrdiff_t pitch, const int8_t* quants,
                          ptrdiff_t stride, Ints (*sums)[kRows]) {
    using Words = typename S::Words;
    STAGECOACH_UNROLL
    for (int c = 0; c < 8 / U::kChain; ++c) {
      Words dot[kStrips][kRows] = {};
      STAGECOACH_UNROLL
      for (int i = 0; i < U::kChain; ++i) {
        const int j = c * U::kChain + i;
        STAGECOACH_UNROLL
        for (int t = 0; t < kRows; ++t) {
          const Bytes x = S::Broadcast4(quants + t * stride + 4 * j);
          STAGECOACH_UNROLL
          for (int p = 0; p < kStrips; ++p) {
            const Words product = S::MulAddBytes(groups[p * pitch].weights[j], x);
            dot[p][t] = i == 0 ? product : S::Add(dot[p][t], product);
          }
        }
      }
      STAGECOACH_UNROLL
      for (int p = 0; p < kStrips; ++p) {
        const Words scale = U::kUnitScale
                                ? S::OneWords()
                                : groups[p * pitch].scales.scale[c * U::kChain * U::kHalves / 8];
        STAGECOACH_UNROLL
        for (int t = 0; t < kRows; ++t) {
          const Ints product = S::MulAddWords(dot[p][t], scale);
          sums[p][t] = c == 0 ? product : S::Add(sums[p][t], product);
        }
      }
    }
  }
  template <int kStrips, int kRows>
  static void DotSigned(const UnpackedGroup* groups, ptrdiff_t pitch, const int8_t* quants,
                        ptrdiff_t stride, Ints (*sums)[kRows]) {
    STAGECOACH_UNROLL
    for (int j = 0; j < 8; ++j) {
      STAGECOACH_UNROLL
      for (int p = 0; p < kStrips; ++p) {
        const Bytes w = groups[p * pitch].weights[j];
        const Bytes magnitude = S::Abs(w);
        STAGECOACH_UNROLL
        for (int t = 0; t < kRows; ++t) {
          const Bytes x = S::Sign(S::Broadcast4(quants + t * stride + 4 * j), w);
          const Ints product = S::MulAddWords(S::MulAddBytes(magnitude, x), S::OneWords());
          sums[p][t] = j == 0 ? product : S::Add(sums[p][t], product);
        }
      }
    }
  }

  // Adds one group to the sums of kStrips strips and kRows rows.
  template <int kStrips, int kRows>
  static void AddGroup(const UnpackedGroup* groups, ptrdiff_t pitch, const int8_t* quants,
                       ptrdiff_t stride, const ActivationScale* scales, ptrdiff_t scale_stride,
                       Floats (*acc)[kRows]) {
    Floats sums[kStrips][kRows];
    Dot<kStrips, kRows>(groups, pitch, quants, stride, sums);
    STAGECOACH_UNROLL
    for (int p = 0; p < kStrips; ++p) {
      const GroupScales<S>& s = groups[p * pitch].scales;
      STAGECOACH_UNROLL
      for (int t = 0; t < kRows; ++t) {
        const ActivationScale& x = scales[t * scale_stride];
        Floats value = S::Mul(sums[p][t], S::Mul(s.delta, S::Set(x.scale)));
        if constexpr (U::kMin) {
          if constexpr (U::kHalves == 1) {
            value = S::Sub(value, S::Mul(s.min[0], S::Set(x.sum)));
          } else {
            value = S::Sub(value, S::Mul(s.min[0], S::Set(x.half_sums[0])));
            value = S::Sub(value, S::Mul(s.min[1], S::Set(x.half_sums[1])));
          }
        }
        acc[p][t] = S::Add(acc[p][t], value);
      }
    }
  }

  // kRows rows of one strip, or as many as there are: weights go from memory to registers.
  template <int kRows>
  static void RunFew(const Strip<S, Record>& strip, const ActivationView& x, int first_row,
                     bool accumulate, float* y, ptrdiff_t y_stride) {
    if constexpr (kRows > 1) {
      if (x.rows - first_row < kRows) {
        return RunFew<kRows - 1>(strip, x, first_row, accumulate, y, y_stride);
      }
    }
    const ptrdiff_t blocks = x.columns / kActivationBlock;
    const int records = x.columns / (kActivationBlock * Record::kGroups);
    const Record* record = strip.records;
    const int8_t* quants = x.quants + static_cast<ptrdiff_t>(first_row) * x.columns;
    const ActivationScale* scales = x.scales + first_row * blocks;
    Floats acc[1][kRows];
    STAGECOACH_UNROLL
    for (int t = 0; t < kRows; ++t) acc[0][t] = S::Set(0);
    for (int i = 0; i < records; ++i, ++record) {
      for (int g = 0; g < Record::kGroups; ++g) {
        UnpackedGroup group;
        UnpackGroup(*record, g, strip.pitch, &group);
        AddGroup<1, kRows>(&group, 0, quants, x.columns, scales, blocks, acc);
        quants += kActivationBlock;
        ++scales;
      }
    }
    STAGECOACH_UNROLL
    for (int t = 0; t < kRows; ++t) {
      strip.Store(acc[0][t], accumulate, y + (first_row + t) * y_stride);
    }
  }

  // The kRows rows of a tile, or as many as there are.
  // acc: [kStrips][kSlabRows], from the tile's first row on; what it holds counts unless `fresh`.
  template <int kStrips, int kRows>
  static void RunTile(bool fresh, int rows, const UnpackedGroup* groups, int count,
                      const int8_t* quants, ptrdiff_t stride, const ActivationScale* scales,
                      ptrdiff_t scale_stride, Floats (*acc)[kSlabRows]) {
    if constexpr (kRows > 1) {
      if (rows < kRows) {
        return RunTile<kStrips, kRows - 1>(fresh, rows, groups, count, quants, stride, scales,
                                           scale_stride, acc);
      }
    }
    Floats local[kStrips][kRows];
    STAGECOACH_UNROLL
    for (int p = 0; p < kStrips; ++p) {
      STAGECOACH_UNROLL
      for (int t = 0; t < kRows; ++t) local[p][t] = fresh ? S::Set(0) : acc[p][t];
    }
    for (int g = 0; g < count; ++g) {
      AddGroup<kStrips, kRows>(groups + g, kChunkGroups, quants + g * kActivationBlock, stride,
                               scales + g, scale_stride, local);
    }
    STAGECOACH_UNROLL
    for (int p = 0; p < kStrips; ++p) {
      STAGECOACH_UNROLL
      for (int t = 0; t < kRows; ++t) acc[p][t] = local[p][t];
    }
  }

  // groups: [kStrips][kChunkGroups], `count` of them used.
  template <int kStrips>
  static void RunChunk(const UnpackedGroup* groups, int count, const ActivationView& x,
                       int first_row, int rows, int first_group, Floats (*acc)[kSlabRows]) {
    const ptrdiff_t blocks = x.columns / kActivationBlock;
    const int8_t* quants = x.quants + static_cast<ptrdiff_t>(first_row) * x.columns +
                           static_cast<ptrdiff_t>(first_group) * kActivationBlock;
    const ActivationScale* scales = x.scales + first_row * blocks + first_group;
    for (int t = 0; t < rows; t += kTileRows) {
      RunTile<kStrips, kTileRows>(first_group == 0, rows - t, groups, count, quants, x.columns,
                                  scales, blocks,
                                  reinterpret_cast<Floats(*)[kSlabRows]>(&acc[0][t]));
      quants += kTileRows * static_cast<ptrdiff_t>(x.columns);
      scales += kTileRows * blocks;
    }
  }

  // Strips that share the loads of activations: as many as leave their sums in registers.
  static constexpr int kSlabStrips = S::kByteDots ? 2 : U::kSigned || U::kChain < 8 ? 1 : 2;

  static void RunSlab(const MatrixView& w, int first_panel, int last_panel, const ActivationView& x,
                      int first_row, int rows, bool accumulate, float* y, ptrdiff_t y_stride) {
    constexpr int kAtOnce = kSlabStrips * S::kPanels;
    int panel = first_panel;
    for (; panel + kAtOnce <= last_panel; panel += kAtOnce) {
      RunStrips<kSlabStrips>(w, panel, last_panel, x, first_row, rows, accumulate, y, y_stride);
    }
    for (; panel < last_panel; panel += S::kPanels) {
      RunStrips<1>(w, panel, last_panel, x, first_row, rows, accumulate, y, y_stride);
    }
  }

  template <int kStrips>
  static void RunStrips(const MatrixView& w, int panel, int last_panel, const ActivationView& x,
                        int first_row, int rows, bool accumulate, float* y, ptrdiff_t y_stride) {
    const int groups = w.columns / kActivationBlock;
    UnpackedGroup unpacked[kStrips][kChunkGroups];
    Floats acc[kStrips][kSlabRows];
    for (int first = 0; first < groups; first += kChunkGroups) {
      const int count = groups - first < kChunkGroups ? groups - first : kChunkGroups;
      for (int p = 0; p < kStrips; ++p) {
        const Strip<S, Record> strip(w, panel + p * S::kPanels, last_panel);
        for (int i = 0; i < count; ++i) {
          UnpackGroup(strip.records[(first + i) / Record::kGroups], (first + i) % Record::kGroups,
                      strip.pitch, &unpacked[p][i]);
        }
      }
      RunChunk<kStrips>(unpacked[0], count, x, first_row, rows, first, acc);
    }
    for (int p = 0; p < kStrips; ++p) {
      const int first = panel + p * S::kPanels;
      const Strip<S, Record> strip(w, first, last_panel);
      for (int t = 0; t < rows; ++t) {
        strip.Store(acc[p][t], accumulate, y + (first_row + t) * y_stride + first * kPanelRows);
      }
    }
  }
};

template <class S, class Record>
class FloatMatmul {
 public:
  static void Run(const MatrixView& w, int first_panel, int last_panel, const ActivationView& x,
                  bool accumulate, float* y, ptrdiff_t y_stride) {
    for (int panel = first_panel; panel < last_panel; panel += S::kPanels) {
      const Strip<S, Record> strip(w, panel, last_panel);
      int t = 0;
      for (; t + 2 <= x.rows; t += 2) {
        RunTile<2>(strip, x, t, accumulate, y + t * y_stride + panel * kPanelRows, y_stride);
      }
      if (t < x.rows) {
        RunTile<1>(strip, x, t, accumulate, y + t * y_stride + panel * kPanelRows, y_stride);
      }
    }
  }

 private:
  using Floats = typename S::Floats;

  template <int kRows>
  static void RunTile(const Strip<S, Record>& strip, const ActivationView& x, int row,
                      bool accumulate, float* y, ptrdiff_t y_stride) {
    const float* values = x.values + static_cast<ptrdiff_t>(row) * x.columns;
    Floats acc[kRows][4];
    STAGECOACH_UNROLL
    for (int t = 0; t < kRows; ++t) {
      STAGECOACH_UNROLL
      for (int i = 0; i < 4; ++i) acc[t][i] = S::Set(0);
    }
    int k = 0;
    for (; k + 4 <= x.columns; k += 4) {
      STAGECOACH_UNROLL
      for (int i = 0; i < 4; ++i) {
        const Floats w = LoadColumn<S>(strip.records[k + i], strip.pitch);
        STAGECOACH_UNROLL
        for (int t = 0; t < kRows; ++t) {
          const Floats product = S::Mul(w, S::Set(values[t * x.columns + k + i]));
          acc[t][i] = S::Add(acc[t][i], product);
        }
      }
    }
    for (; k < x.columns; ++k) {
      const Floats w = LoadColumn<S>(strip.records[k], strip.pitch);
      for (int t = 0; t < kRows; ++t) {
        acc[t][k % 4] = S::Add(acc[t][k % 4], S::Mul(w, S::Set(values[t * x.columns + k])));
      }
    }
    STAGECOACH_UNROLL
    for (int t = 0; t < kRows; ++t) {
      const Floats sum = S::Add(S::Add(acc[t][0], acc[t][2]), S::Add(acc[t][1], acc[t][3]));
      strip.Store(sum, accumulate, y + t * y_stride);
    }
  }
};

template <class S>
void Matmul(const MatrixView& w, int first_panel, int last_panel, const ActivationView& x,
            bool accumulate, float* y, ptrdiff_t y_stride) {
  switch (w.type) {
#define STAGECOACH_CASE(kind, name)                                                         \
  case TensorType::k##name:                                                                 \
    return kind##Matmul<S, Record##name>::Run(w, first_panel, last_panel, x, accumulate, y, \
                                              y_stride)
    STAGECOACH_CASE(Float, F32);
    STAGECOACH_CASE(Float, F16);
    STAGECOACH_CASE(Float, BF16);
    STAGECOACH_CASE(Quant, Q4_0);
    STAGECOACH_CASE(Quant, Q4_1);
    STAGECOACH_CASE(Quant, Q5_0);
    STAGECOACH_CASE(Quant, Q5_1);
    STAGECOACH_CASE(Quant, Q8_0);
    STAGECOACH_CASE(Quant, Q2_K);
    STAGECOACH_CASE(Quant, Q3_K);
    STAGECOACH_CASE(Quant, Q4_K);
    STAGECOACH_CASE(Quant, Q5_K);
    STAGECOACH_CASE(Quant, Q6_K);
#undef STAGECOACH_CASE
  }
}

}  // namespace stagecoach::cpu

#endif  // STAGECOACH_KERNELS_CPU_MATMUL_KERNEL_H_
