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
  // Signed quants need no unpacking.
  static constexpr int kDirectRows = U::kSigned ? kSlabRows : 8;
  // How far ahead of its use a weight is fetched. A record is read in several strands at once,
  // which the processor's own prefetching follows badly.
  static constexpr size_t kPrefetchBytes = 4096;
  static constexpr int kChunkGroups = 16;

  struct UnpackedGroup {
    Bytes weights[8];
    GroupScales<S> scales;
  };

  // Integer part of one group for kPanels panels and kRows rows. groups: of the panels, `pitch`
  // apart; quants: of the group, rows `stride` apart.
  template <int kPanels, int kRows>
  static void Dot(const UnpackedGroup* groups, ptrdiff_t pitch, const int8_t* quants,
                  ptrdiff_t stride, Ints (*sums)[kRows]) {
    if constexpr (U::kSigned) {
      STAGECOACH_UNROLL
      for (int j = 0; j < 8; ++j) {
        STAGECOACH_UNROLL
        for (int p = 0; p < kPanels; ++p) {
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
    } else {
      STAGECOACH_UNROLL
      for (int c = 0; c < 8 / U::kChain; ++c) {
        Words dot[kPanels][kRows] = {};
        STAGECOACH_UNROLL
        for (int i = 0; i < U::kChain; ++i) {
          const int j = c * U::kChain + i;
          STAGECOACH_UNROLL
          for (int t = 0; t < kRows; ++t) {
            const Bytes x = S::Broadcast4(quants + t * stride + 4 * j);
            STAGECOACH_UNROLL
            for (int p = 0; p < kPanels; ++p) {
              const Words product = S::MulAddBytes(groups[p * pitch].weights[j], x);
              dot[p][t] = i == 0 ? product : S::Add(dot[p][t], product);
            }
          }
        }
        STAGECOACH_UNROLL
        for (int p = 0; p < kPanels; ++p) {
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
  }

  // Adds one group to the sums of kPanels panels and kRows rows.
  template <int kPanels, int kRows>
  static void AddGroup(const UnpackedGroup* groups, ptrdiff_t pitch, const int8_t* quants,
                       ptrdiff_t stride, const ActivationScale* scales, ptrdiff_t scale_stride,
                       Floats (*acc)[kRows]) {
    Ints sums[kPanels][kRows] = {};
    Dot<kPanels, kRows>(groups, pitch, quants, stride, sums);
    STAGECOACH_UNROLL
    for (int p = 0; p < kPanels; ++p) {
      const GroupScales<S>& s = groups[p * pitch].scales;
      STAGECOACH_UNROLL
      for (int t = 0; t < kRows; ++t) {
        const ActivationScale& x = scales[t * scale_stride];
        Floats value = S::Mul(S::ToFloats(sums[p][t]), S::Mul(s.delta, S::Set(x.scale)));
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

  // Fetches what lies kPrefetchBytes behind a group.
  static void Prefetch(const Record& record, int group) {
    constexpr size_t kGroupBytes = sizeof(Record) / Record::kGroups;
    const uint8_t* ahead =
        reinterpret_cast<const uint8_t*>(&record) + group * kGroupBytes + kPrefetchBytes;
    for (size_t i = 0; i < kGroupBytes; i += 64) __builtin_prefetch(ahead + i);
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
    Floats acc[1][kRows];
    STAGECOACH_UNROLL
    for (int t = 0; t < kRows; ++t) acc[0][t] = S::Set(0);
    for (int i = 0; i < records; ++i, ++record) {
      for (int g = 0; g < Record::kGroups; ++g) {
        Prefetch(*record, g);
        UnpackedGroup group;
        U::Weights(*record, g, group.weights);
        U::Scales(*record, g, &group.scales);
        AddGroup<1, kRows>(&group, 0, quants, x.columns, scales, blocks, acc);
        quants += kActivationBlock;
        ++scales;
      }
    }
    STAGECOACH_UNROLL
    for (int t = 0; t < kRows; ++t) {
      StorePanel<S>(acc[0][t], Outputs(w, panel), accumulate,
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

  // acc: [kPanels][kSlabRows], from the tile's first row on.
  template <int kPanels, int kRows>
  static void RunTile(const UnpackedGroup* groups, int count, const int8_t* quants,
                      ptrdiff_t stride, const ActivationScale* scales, ptrdiff_t scale_stride,
                      Floats (*acc)[kSlabRows]) {
    Floats local[kPanels][kRows];
    STAGECOACH_UNROLL
    for (int p = 0; p < kPanels; ++p) {
      STAGECOACH_UNROLL
      for (int t = 0; t < kRows; ++t) local[p][t] = acc[p][t];
    }
    for (int g = 0; g < count; ++g) {
      AddGroup<kPanels, kRows>(groups + g, kChunkGroups, quants + g * kActivationBlock, stride,
                               scales + g, scale_stride, local);
    }
    STAGECOACH_UNROLL
    for (int p = 0; p < kPanels; ++p) {
      STAGECOACH_UNROLL
      for (int t = 0; t < kRows; ++t) acc[p][t] = local[p][t];
    }
  }

  // groups: [kPanels][kChunkGroups], `count` of them used.
  template <int kPanels>
  static void RunChunk(const UnpackedGroup* groups, int count, const ActivationView& x,
                       int first_row, int rows, int first_group, Floats (*acc)[kSlabRows]) {
    const ptrdiff_t blocks = x.columns / kActivationBlock;
    const int8_t* quants = x.quants + static_cast<ptrdiff_t>(first_row) * x.columns +
                           static_cast<ptrdiff_t>(first_group) * kActivationBlock;
    const ActivationScale* scales = x.scales + first_row * blocks + first_group;
    for (int t = 0; t < rows; t += kTileRows) {
      const auto at = reinterpret_cast<Floats(*)[kSlabRows]>(&acc[0][t]);
      switch (rows - t) {
        case 1:
          RunTile<kPanels, 1>(groups, count, quants, x.columns, scales, blocks, at);
          break;
        case 2:
          RunTile<kPanels, 2>(groups, count, quants, x.columns, scales, blocks, at);
          break;
        case 3:
          RunTile<kPanels, 3>(groups, count, quants, x.columns, scales, blocks, at);
          break;
        default:
          RunTile<kPanels, kTileRows>(groups, count, quants, x.columns, scales, blocks, at);
          break;
      }
      quants += kTileRows * static_cast<ptrdiff_t>(x.columns);
      scales += kTileRows * blocks;
    }
  }

  // Panels that share the loads of activations: as many as leave their sums in registers.
  static constexpr int kSlabPanels = U::kSigned || U::kChain < 8 ? 1 : 2;

  static void RunSlab(const MatrixView& w, int first_panel, int last_panel, const ActivationView& x,
                      int first_row, int rows, bool accumulate, float* y, ptrdiff_t y_stride) {
    int panel = first_panel;
    for (; panel + kSlabPanels <= last_panel; panel += kSlabPanels) {
      RunPanels<kSlabPanels>(w, panel, x, first_row, rows, accumulate, y, y_stride);
    }
    for (; panel < last_panel; ++panel) {
      RunPanels<1>(w, panel, x, first_row, rows, accumulate, y, y_stride);
    }
  }

  template <int kPanels>
  static void RunPanels(const MatrixView& w, int panel, const ActivationView& x, int first_row,
                        int rows, bool accumulate, float* y, ptrdiff_t y_stride) {
    const int groups = w.columns / kActivationBlock;
    UnpackedGroup unpacked[kPanels][kChunkGroups];
    Floats acc[kPanels][kSlabRows];
    for (int p = 0; p < kPanels; ++p) {
      for (int t = 0; t < rows; ++t) acc[p][t] = S::Set(0);
    }
    for (int first = 0; first < groups; first += kChunkGroups) {
      const int count = groups - first < kChunkGroups ? groups - first : kChunkGroups;
      for (int p = 0; p < kPanels; ++p) {
        const Record* records = Panel(w, panel + p);
        for (int i = 0; i < count; ++i) {
          const Record& record = records[(first + i) / Record::kGroups];
          Prefetch(record, (first + i) % Record::kGroups);
          U::Weights(record, (first + i) % Record::kGroups, unpacked[p][i].weights);
          U::Scales(record, (first + i) % Record::kGroups, &unpacked[p][i].scales);
        }
      }
      RunChunk<kPanels>(unpacked[0], count, x, first_row, rows, first, acc);
    }
    for (int p = 0; p < kPanels; ++p) {
      for (int t = 0; t < rows; ++t) {
        StorePanel<S>(acc[p][t], Outputs(w, panel + p), accumulate,
                      y + (first_row + t) * y_stride + (panel + p) * kPanelRows);
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
