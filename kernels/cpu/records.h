// How weights lie in memory for the CPU kernels: panels of 8 rows, each a run of records. A record
// holds one block of columns (32 or 256) of 8 rows, in groups of 32 columns:
//
//   quants    vector j (0..7) of a group is 32 bytes: row r, columns 4j .. 4j + 3 at bytes
//             4r .. 4r + 3. Quants are stored unsigned, quant + kOffset (except Q8_0).
//   nibbles   byte k of vector i (0..3): low half of vector i, high half of vector i + 4
//   pairs     byte k of vector i (0..1): 2 bits of each of vectors 4i .. 4i + 3, lowest first
//   bits      byte k: bit j of vector j
//   scales    [group][8 rows]
//
// A weight is d * scale * quant - d_min * min (model/block_decode.h).
#ifndef STAGECOACH_KERNELS_CPU_RECORDS_H_
#define STAGECOACH_KERNELS_CPU_RECORDS_H_

#include <cstdint>

namespace stagecoach::cpu {

using RowHalves = uint16_t[8];  // one half per row
using RowBytes = uint8_t[8];

struct RecordQ4_0 {
  static constexpr int kGroups = 1, kOffset = 8;
  RowHalves d;
  uint8_t nibbles[kGroups][128];
};
struct RecordQ4_1 {
  static constexpr int kGroups = 1, kOffset = 0;
  RowHalves d, d_min;
  uint8_t nibbles[kGroups][128];
};
struct RecordQ5_0 {
  static constexpr int kGroups = 1, kOffset = 16;
  RowHalves d;
  uint8_t bits[kGroups][32];
  uint8_t nibbles[kGroups][128];
};
struct RecordQ5_1 {
  static constexpr int kGroups = 1, kOffset = 0;
  RowHalves d, d_min;
  uint8_t bits[kGroups][32];
  uint8_t nibbles[kGroups][128];
};
struct RecordQ8_0 {
  static constexpr int kGroups = 1, kOffset = 0;
  RowHalves d;
  uint8_t quants[kGroups][256];  // signed
};
struct RecordQ2_K {
  static constexpr int kGroups = 8, kOffset = 0;
  RowHalves d, d_min;
  RowBytes scales_and_mins[2 * kGroups];  // of 16 columns; low half: scale, high half: min
  uint8_t pairs[kGroups][64];
};
struct RecordQ3_K {
  static constexpr int kGroups = 8, kOffset = 4;
  RowHalves d;
  RowBytes scales[2 * kGroups];  // of 16 columns, signed
  uint8_t bits[kGroups][32];     // third bit of the quants
  uint8_t pairs[kGroups][64];
};
struct RecordQ4_K {
  static constexpr int kGroups = 8, kOffset = 0;
  RowHalves d, d_min;
  RowBytes scales[kGroups], mins[kGroups];
  uint8_t nibbles[kGroups][128];
};
struct RecordQ5_K {
  static constexpr int kGroups = 8, kOffset = 0;
  RowHalves d, d_min;
  RowBytes scales[kGroups], mins[kGroups];
  uint8_t bits[kGroups][32];  // fifth bit of the quants
  uint8_t nibbles[kGroups][128];
};
struct RecordQ6_K {
  static constexpr int kGroups = 8, kOffset = 32;
  RowHalves d;
  RowBytes scales[2 * kGroups];  // of 16 columns, signed
  uint8_t pairs[kGroups][64];    // fifth and sixth bit of the quants
  uint8_t nibbles[kGroups][128];
};
// Float types: one column of 8 rows.
struct RecordF32 {
  float values[8];
};
struct RecordF16 {
  RowHalves values;
};
struct RecordBF16 {
  RowHalves values;
};

static_assert(sizeof(RecordQ4_0) == 144 && sizeof(RecordQ4_1) == 160);
static_assert(sizeof(RecordQ5_0) == 176 && sizeof(RecordQ5_1) == 192 && sizeof(RecordQ8_0) == 272);
static_assert(sizeof(RecordQ2_K) == 672 && sizeof(RecordQ3_K) == 912);
static_assert(sizeof(RecordQ4_K) == 1184 && sizeof(RecordQ5_K) == 1440);
static_assert(sizeof(RecordQ6_K) == 1680);

}  // namespace stagecoach::cpu

#endif  // STAGECOACH_KERNELS_CPU_RECORDS_H_
