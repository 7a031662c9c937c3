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

// Writes the 8 outputs of a panel, or as many as the matrix has.
template <class S>
inline void StorePanel(typename S::Floats value, int outputs, bool accumulate, float* y) {
  if (outputs == kPanelRows) {
    S::Store(accumulate ? S::Add(S::Load(y), value) : value, y);
    return;
  }
  float buffer[kPanelRows];
  S::Store(value, buffer);
  for (int i = 0; i < outputs; ++i) y[i] = accumulate ? y[i] + buffer[i] : buffer[i];
}

inline constexpr int kTileRows = 4;

template <class S, class Record>
class QuantMatmul {
 public:
  static void Run(const MatrixView& w, int first_panel, int last_panel, const ActivationView& x,
                  bool accumulate, float* y, ptrdiff_t y_stride) {
    if (x.rows <= kDirectRows) {
      // Each panel for all rows, from memory the first time and from the cache after that.
      for (int panel = first_panel; panel < last_panel; ++panel) {
        for (int row = 0; row < x.rows; row += kTileRows) {
          RunDirect(w, panel, x, row, accumulate, y, y_stride);
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
  using Words = typename S::Words;
  using Ints = typename S::Ints;
  using Floats = typename S::Floats;

  // A slab of rows is taken through all panels before the next, so that its activations stay in
  // the second-level cache; a chunk of a panel is unpacked once per slab.
  static constexpr int kSlabRows = 64;
  // Up to here unpacking again for every tile of rows costs less than storing what was unpacked.
  static constexpr int kDirectRows = 16;
  // How far ahead of its use a weight is fetched. A record is read in several strands at once,
  // which the processor's own prefetching follows badly.
  static constexpr size_t kPrefetchBytes = 4096;
  static constexpr int kChunkGroups = 16;

  struct UnpackedGroup {
    Bytes weights[8];
    GroupScales<S> scales;
  };

  // Integer part of one group for kRows rows; quants: of the group, rows `stride` apart.
  template <int kRows>
  static void Dot(const Bytes* w, const GroupScales<S>& s, const int8_t* quants, ptrdiff_t stride,
                  Ints* sums) {
    if constexpr (U::kSigned) {
      STAGECOACH_UNROLL
      for (int j = 0; j < 8; ++j) {
        const Bytes magnitude = S::Abs(w[j]);
        STAGECOACH_UNROLL
        for (int t = 0; t < kRows; ++t) {
          const Bytes x = S::Sign(S::Broadcast4(quants + t * stride + 4 * j), w[j]);
          const Ints product = S::MulAddWords(S::MulAddBytes(magnitude, x), S::OneWords());
          sums[t] = j == 0 ? product : S::Add(sums[t], product);
        }
      }
    } else {
      STAGECOACH_UNROLL
      for (int c = 0; c < 8 / U::kChain; ++c) {
        Words dot[kRows] = {};
        STAGECOACH_UNROLL
        for (int i = 0; i < U::kChain; ++i) {
          const int j = c * U::kChain + i;
          STAGECOACH_UNROLL
          for (int t = 0; t < kRows; ++t) {
            const Words product = S::MulAddBytes(w[j], S::Broadcast4(quants + t * stride + 4 * j));
            dot[t] = i == 0 ? product : S::Add(dot[t], product);
          }
        }
        const Words scale = U::kUnitScale ? S::OneWords() : s.scale[c * U::kChain * U::kHalves / 8];
        STAGECOACH_UNROLL
        for (int t = 0; t < kRows; ++t) {
          const Ints product = S::MulAddWords(dot[t], scale);
          sums[t] = c == 0 ? product : S::Add(sums[t], product);
        }
      }
    }
  }

  // Adds one group to the sums of kRows rows.
  template <int kRows>
  static void AddGroup(const Bytes* w, const GroupScales<S>& s, const int8_t* quants,
                       ptrdiff_t stride, const ActivationScale* scales, ptrdiff_t scale_stride,
                       Floats* acc) {
    Ints sums[kRows] = {};
    Dot<kRows>(w, s, quants, stride, sums);
    STAGECOACH_UNROLL
    for (int t = 0; t < kRows; ++t) {
      const ActivationScale& x = scales[t * scale_stride];
      Floats value = S::Mul(S::ToFloats(sums[t]), S::Mul(s.delta, S::Set(x.scale)));
      if constexpr (U::kMin) {
        if constexpr (U::kHalves == 1) {
          value = S::Sub(value, S::Mul(s.min[0], S::Set(x.sum)));
        } else {
          value = S::Sub(value, S::Mul(s.min[0], S::Set(x.half_sums[0])));
          value = S::Sub(value, S::Mul(s.min[1], S::Set(x.half_sums[1])));
        }
      }
      acc[t] = S::Add(acc[t], value);
    }
  }

  static const Record* Panel(const MatrixView& w, int panel) {
    return reinterpret_cast<const Record*>(w.data + static_cast<size_t>(panel) * w.panel_bytes);
  }
  static int Outputs(const MatrixView& w, int panel) {
    const int left = w.rows - panel * kPanelRows;
    return left < kPanelRows ? left : kPanelRows;
  }

  // kRows rows of one panel: weights go from memory to registers.
  template <int kRows>
  static void RunFew(const MatrixView& w, int panel, const ActivationView& x, int first_row,
                     bool accumulate, float* y, ptrdiff_t y_stride) {
    const ptrdiff_t blocks = x.columns / kActivationBlock;
    const int records = w.columns / (kActivationBlock * Record::kGroups);
    const Record* record = Panel(w, panel);
    const int8_t* quants = x.quants + static_cast<ptrdiff_t>(first_row) * x.columns;
    const ActivationScale* scales = x.scales + first_row * blocks;
    Floats acc[kRows];
    STAGECOACH_UNROLL
    for (int t = 0; t < kRows; ++t) acc[t] = S::Set(0);
    for (int i = 0; i < records; ++i, ++record) {
      for (int g = 0; g < Record::kGroups; ++g) {
        constexpr size_t kGroupBytes = sizeof(Record) / Record::kGroups;
        const uint8_t* ahead =
            reinterpret_cast<const uint8_t*>(record) + g * kGroupBytes + kPrefetchBytes;
        for (size_t i = 0; i < kGroupBytes; i += 64) __builtin_prefetch(ahead + i);
        Bytes weights[8];
        GroupScales<S> group;
        U::Weights(*record, g, weights);
        U::Scales(*record, g, &group);
        AddGroup<kRows>(weights, group, quants, x.columns, scales, blocks, acc);
        quants += kActivationBlock;
        ++scales;
      }
    }
    STAGECOACH_UNROLL
    for (int t = 0; t < kRows; ++t) {
      StorePanel<S>(acc[t], Outputs(w, panel), accumulate,
                    y + (first_row + t) * y_stride + panel * kPanelRows);
    }
  }

  // The kTileRows rows from first_row on, or as many as there are.
  static void RunDirect(const MatrixView& w, int panel, const ActivationView& x, int first_row,
                        bool accumulate, float* y, ptrdiff_t y_stride) {
    switch (x.rows - first_row) {
      case 1:
        return RunFew<1>(w, panel, x, first_row, accumulate, y, y_stride);
      case 2:
        return RunFew<2>(w, panel, x, first_row, accumulate, y, y_stride);
      case 3:
        return RunFew<3>(w, panel, x, first_row, accumulate, y, y_stride);
      default:
        return RunFew<kTileRows>(w, panel, x, first_row, accumulate, y, y_stride);
    }
  }

  template <int kRows>
  static void RunTile(const UnpackedGroup* groups, int count, const int8_t* quants,
                      ptrdiff_t stride, const ActivationScale* scales, ptrdiff_t scale_stride,
                      Floats* acc) {
    Floats local[kRows];
    STAGECOACH_UNROLL
    for (int t = 0; t < kRows; ++t) local[t] = acc[t];
    for (int g = 0; g < count; ++g) {
      AddGroup<kRows>(groups[g].weights, groups[g].scales, quants + g * kActivationBlock, stride,
                      scales + g, scale_stride, local);
    }
    STAGECOACH_UNROLL
    for (int t = 0; t < kRows; ++t) acc[t] = local[t];
  }

  static void RunChunk(const UnpackedGroup* groups, int count, const ActivationView& x,
                       int first_row, int rows, int first_group, Floats* acc) {
    const ptrdiff_t blocks = x.columns / kActivationBlock;
    const int8_t* quants = x.quants + static_cast<ptrdiff_t>(first_row) * x.columns +
                           static_cast<ptrdiff_t>(first_group) * kActivationBlock;
    const ActivationScale* scales = x.scales + first_row * blocks + first_group;
    int t = 0;
    for (; t + kTileRows <= rows; t += kTileRows) {
      RunTile<kTileRows>(groups, count, quants + static_cast<ptrdiff_t>(t) * x.columns, x.columns,
                         scales + t * blocks, blocks, acc + t);
    }
    const int8_t* rest = quants + static_cast<ptrdiff_t>(t) * x.columns;
    switch (rows - t) {
      case 1:
        RunTile<1>(groups, count, rest, x.columns, scales + t * blocks, blocks, acc + t);
        break;
      case 2:
        RunTile<2>(groups, count, rest, x.columns, scales + t * blocks, blocks, acc + t);
        break;
      case 3:
        RunTile<3>(groups, count, rest, x.columns, scales + t * blocks, blocks, acc + t);
        break;
      default:
        break;
    }
  }

  static void RunSlab(const MatrixView& w, int first_panel, int last_panel, const ActivationView& x,
                      int first_row, int rows, bool accumulate, float* y, ptrdiff_t y_stride) {
    const int groups = w.columns / kActivationBlock;
    UnpackedGroup unpacked[kChunkGroups];
    Floats acc[kSlabRows];
    for (int panel = first_panel; panel < last_panel; ++panel) {
      const Record* records = Panel(w, panel);
      for (int t = 0; t < rows; ++t) acc[t] = S::Set(0);
      for (int g = 0; g < groups; g += kChunkGroups) {
        const int count = groups - g < kChunkGroups ? groups - g : kChunkGroups;
        for (int i = 0; i < count; ++i) {
          const Record& record = records[(g + i) / Record::kGroups];
          U::Weights(record, (g + i) % Record::kGroups, unpacked[i].weights);
          U::Scales(record, (g + i) % Record::kGroups, &unpacked[i].scales);
        }
        RunChunk(unpacked, count, x, first_row, rows, g, acc);
      }
      for (int t = 0; t < rows; ++t) {
        StorePanel<S>(acc[t], Outputs(w, panel), accumulate,
                      y + (first_row + t) * y_stride + panel * kPanelRows);
      }
    }
  }
};

template <class S, class Record>
class FloatMatmul {
 public:
  static void Run(const MatrixView& w, int first_panel, int last_panel, const ActivationView& x,
                  bool accumulate, float* y, ptrdiff_t y_stride) {
    for (int panel = first_panel; panel < last_panel; ++panel) {
      const Record* records =
          reinterpret_cast<const Record*>(w.data + static_cast<size_t>(panel) * w.panel_bytes);
      const int left = w.rows - panel * kPanelRows;
      const int outputs = left < kPanelRows ? left : kPanelRows;
      int t = 0;
      for (; t + 2 <= x.rows; t += 2) {
        RunTile<2>(records, x, t, outputs, accumulate, y + t * y_stride + panel * kPanelRows,
                   y_stride);
      }
      if (t < x.rows) {
        RunTile<1>(records, x, t, outputs, accumulate, y + t * y_stride + panel * kPanelRows,
                   y_stride);
      }
    }
  }

 private:
  using Floats = typename S::Floats;

  template <int kRows>
  static void RunTile(const Record* records, const ActivationView& x, int row, int outputs,
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
        const Floats w = LoadColumn<S>(records[k + i]);
        STAGECOACH_UNROLL
        for (int t = 0; t < kRows; ++t) {
          const Floats product = S::Mul(w, S::Set(values[t * x.columns + k + i]));
          acc[t][i] = S::Add(acc[t][i], product);
        }
      }
    }
    for (; k < x.columns; ++k) {
      const Floats w = LoadColumn<S>(records[k]);
      for (int t = 0; t < kRows; ++t) {
        acc[t][k % 4] = S::Add(acc[t][k % 4], S::Mul(w, S::Set(values[t * x.columns + k])));
      }
    }
    STAGECOACH_UNROLL
    for (int t = 0; t < kRows; ++t) {
      const Floats sum = S::Add(S::Add(acc[t][0], acc[t][2]), S::Add(acc[t][1], acc[t][3]));
      StorePanel<S>(sum, outputs, accumulate, y + t * y_stride);
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
