// From packed records (records.h) to vectors of weights and scales, one group of 32 columns at a
// time. S: PortableSimd, Avx2Simd or Avx512Simd.
//
// A vector of S has the rows of S::kPanels panels: of 1, or of 2 whose records lie `pitch` bytes
// apart. What loads from a record takes the pitch too.
#ifndef STAGECOACH_KERNELS_CPU_UNPACK_H_
#define STAGECOACH_KERNELS_CPU_UNPACK_H_

#include <cstddef>
#include <cstdint>

#include "kernels/cpu/records.h"

// Loops over vector registers. Plain loops in portable code, where an array is no register anyway.
#if !defined(__AVX2__)
#define STAGECOACH_UNROLL
#elif defined(__clang__)
#define STAGECOACH_UNROLL _Pragma("clang loop unroll(full)")
#else
#define STAGECOACH_UNROLL _Pragma("GCC unroll 8")
#endif

namespace stagecoach::cpu {

// Scales of one group of 32 columns x 8 rows: weight = delta * scale * quant - min.
template <class S>
struct GroupScales {
  typename S::Scales scale[2];  // of columns 0..15 and 16..31; [0] of all 32 if kHalves is 1
  typename S::Floats min[2];    // likewise
  typename S::Floats delta;
};

template <class S>
inline void UnpackNibbles(const uint8_t* nibbles, ptrdiff_t pitch, typename S::Bytes* w) {
  STAGECOACH_UNROLL
  for (int i = 0; i < 4; ++i) {
    const auto packed = S::LoadBytes(nibbles + 32 * i, pitch);
    w[i] = S::template ShiftMask<0>(packed, 0x0f);
    w[i + 4] = S::template ShiftMask<4>(packed, 0x0f);
  }
}

// 2 bits each.
template <class S>
inline void UnpackPairs(const uint8_t* pairs, ptrdiff_t pitch, typename S::Bytes* w) {
  STAGECOACH_UNROLL
  for (int i = 0; i < 2; ++i) {
    const auto packed = S::LoadBytes(pairs + 32 * i, pitch);
    w[4 * i] = S::template ShiftMask<0>(packed, 3);
    w[4 * i + 1] = S::template ShiftMask<2>(packed, 3);
    w[4 * i + 2] = S::template ShiftMask<4>(packed, 3);
    w[4 * i + 3] = S::template ShiftMask<6>(packed, 3);
  }
}

// ORs 2 bits each at bit 4 of the result.
template <class S>
inline void AddPairs(const uint8_t* pairs, ptrdiff_t pitch, typename S::Bytes* w) {
  STAGECOACH_UNROLL
  for (int i = 0; i < 2; ++i) {
    const auto packed = S::LoadBytes(pairs + 32 * i, pitch);
    w[4 * i] = S::Or(w[4 * i], S::template ShiftMask<-4>(packed, 0x30));
    w[4 * i + 1] = S::Or(w[4 * i + 1], S::template ShiftMask<-2>(packed, 0x30));
    w[4 * i + 2] = S::Or(w[4 * i + 2], S::template ShiftMask<0>(packed, 0x30));
    w[4 * i + 3] = S::Or(w[4 * i + 3], S::template ShiftMask<2>(packed, 0x30));
  }
}

// ORs one bit each at bit kAt of the result.
template <class S, int kAt>
inline void AddBits(const uint8_t* bits, ptrdiff_t pitch, typename S::Bytes* w) {
  constexpr uint8_t kMask = 1 << kAt;
  const auto packed = S::LoadBytes(bits, pitch);
  w[0] = S::Or(w[0], S::template ShiftMask<0 - kAt>(packed, kMask));
  w[1] = S::Or(w[1], S::template ShiftMask<1 - kAt>(packed, kMask));
  w[2] = S::Or(w[2], S::template ShiftMask<2 - kAt>(packed, kMask));
  w[3] = S::Or(w[3], S::template ShiftMask<3 - kAt>(packed, kMask));
  w[4] = S::Or(w[4], S::template ShiftMask<4 - kAt>(packed, kMask));
  w[5] = S::Or(w[5], S::template ShiftMask<5 - kAt>(packed, kMask));
  w[6] = S::Or(w[6], S::template ShiftMask<6 - kAt>(packed, kMask));
  w[7] = S::Or(w[7], S::template ShiftMask<7 - kAt>(packed, kMask));
}

// What the matmul needs to know of a record type:
//   kHalves     1: scales cover 32 columns; 2: 16 columns each
//   kChain      products that fit one int16 sum: 2 * kChain * largest quant * 127 < 2^15
//   kUnitScale  integer scales are all 1
//   kMin        there is a min term (a real one, or kOffset)
//   kSigned     quants are signed bytes
//   Weights     quants of group g, 8 vectors
//   Scales      its scales
// |sum of a half's products| * largest scale < 2^24: exact as a float.
template <class S, class Record>
struct Unpack;

struct SymmetricBlock32 {
  static constexpr int kHalves = 1;
  static constexpr bool kUnitScale = true, kMin = true, kSigned = false;
  template <class S, class Record>
  static void Load(const Record& r, ptrdiff_t pitch, GroupScales<S>* s) {
    s->delta = S::LoadHalf(r.d, pitch);
    s->min[0] = S::Mul(s->delta, S::Set(Record::kOffset));
  }
};
struct MinBlock32 {
  static constexpr int kHalves = 1;
  static constexpr bool kUnitScale = true, kMin = true, kSigned = false;
  template <class S, class Record>
  static void Load(const Record& r, ptrdiff_t pitch, GroupScales<S>* s) {
    s->delta = S::LoadHalf(r.d, pitch);
    s->min[0] = S::LoadHalf(r.d_min, pitch);
  }
};
struct MinSuperblock32 {  // Q4_K, Q5_K
  static constexpr int kHalves = 1;
  static constexpr bool kUnitScale = false, kMin = true, kSigned = false;
  template <class S, class Record>
  static void Load(const Record& r, int g, ptrdiff_t pitch, GroupScales<S>* s) {
    s->delta = S::LoadHalf(r.d, pitch);
    s->scale[0] = S::ScalesUnsigned(r.scales[g], pitch);
    s->min[0] = S::Mul(S::FloatsFromUnsigned(r.mins[g], pitch), S::LoadHalf(r.d_min, pitch));
  }
};
struct SymmetricSuperblock16 {  // Q3_K, Q6_K
  static constexpr int kHalves = 2;
  static constexpr bool kUnitScale = false, kMin = true, kSigned = false;
  template <class S, class Record>
  static void Load(const Record& r, int g, ptrdiff_t pitch, GroupScales<S>* s) {
    s->delta = S::LoadHalf(r.d, pitch);
    const auto unit = S::Mul(s->delta, S::Set(Record::kOffset));
    for (int h = 0; h < 2; ++h) {
      s->scale[h] = S::ScalesSigned(r.scales[2 * g + h], pitch);
      s->min[h] = S::Mul(S::FloatsFromSigned(r.scales[2 * g + h], pitch), unit);
    }
  }
};

template <class S>
struct Unpack<S, RecordQ4_0> : SymmetricBlock32 {
  static constexpr int kChain = 8;
  static void Weights(const RecordQ4_0& r, int g, ptrdiff_t pitch, typename S::Bytes* w) {
    UnpackNibbles<S>(r.nibbles[g], pitch, w);
  }
  static void Scales(const RecordQ4_0& r, int, ptrdiff_t pitch, GroupScales<S>* s) {
    Load<S>(r, pitch, s);
  }
};

template <class S>
struct Unpack<S, RecordQ4_1> : MinBlock32 {
  static constexpr int kChain = 8;
  static void Weights(const RecordQ4_1& r, int g, ptrdiff_t pitch, typename S::Bytes* w) {
    UnpackNibbles<S>(r.nibbles[g], pitch, w);
  }
  static void Scales(const RecordQ4_1& r, int, ptrdiff_t pitch, GroupScales<S>* s) {
    Load<S>(r, pitch, s);
  }
};

template <class S>
struct Unpack<S, RecordQ5_0> : SymmetricBlock32 {
  static constexpr int kChain = 4;
  static void Weights(const RecordQ5_0& r, int g, ptrdiff_t pitch, typename S::Bytes* w) {
    UnpackNibbles<S>(r.nibbles[g], pitch, w);
    AddBits<S, 4>(r.bits[g], pitch, w);
  }
  static void Scales(const RecordQ5_0& r, int, ptrdiff_t pitch, GroupScales<S>* s) {
    Load<S>(r, pitch, s);
  }
};

template <class S>
struct Unpack<S, RecordQ5_1> : MinBlock32 {
  static constexpr int kChain = 4;
  static void Weights(const RecordQ5_1& r, int g, ptrdiff_t pitch, typename S::Bytes* w) {
    UnpackNibbles<S>(r.nibbles[g], pitch, w);
    AddBits<S, 4>(r.bits[g], pitch, w);
  }
  static void Scales(const RecordQ5_1& r, int, ptrdiff_t pitch, GroupScales<S>* s) {
    Load<S>(r, pitch, s);
  }
};

template <class S>
struct Unpack<S, RecordQ8_0> {
  static constexpr int kHalves = 1, kChain = 1;
  static constexpr bool kUnitScale = true, kMin = false, kSigned = true;
  static void Weights(const RecordQ8_0& r, int g, ptrdiff_t pitch, typename S::Bytes* w) {
    STAGECOACH_UNROLL
    for (int j = 0; j < 8; ++j) w[j] = S::LoadBytes(r.quants[g] + 32 * j, pitch);
  }
  static void Scales(const RecordQ8_0& r, int, ptrdiff_t pitch, GroupScales<S>* s) {
    s->delta = S::LoadHalf(r.d, pitch);
  }
};

template <class S>
struct Unpack<S, RecordQ2_K> {
  static constexpr int kHalves = 2, kChain = 4;
  static constexpr bool kUnitScale = false, kMin = true, kSigned = false;
  static void Weights(const RecordQ2_K& r, int g, ptrdiff_t pitch, typename S::Bytes* w) {
    UnpackPairs<S>(r.pairs[g], pitch, w);
  }
  static void Scales(const RecordQ2_K& r, int g, ptrdiff_t pitch, GroupScales<S>* s) {
    s->delta = S::LoadHalf(r.d, pitch);
    const auto d_min = S::LoadHalf(r.d_min, pitch);
    for (int h = 0; h < 2; ++h) {
      s->scale[h] = S::ScalesLowNibble(r.scales_and_mins[2 * g + h], pitch);
      s->min[h] = S::Mul(S::FloatsFromHighNibble(r.scales_and_mins[2 * g + h], pitch), d_min);
    }
  }
};

template <class S>
struct Unpack<S, RecordQ3_K> : SymmetricSuperblock16 {
  static constexpr int kChain = 4;
  static void Weights(const RecordQ3_K& r, int g, ptrdiff_t pitch, typename S::Bytes* w) {
    UnpackPairs<S>(r.pairs[g], pitch, w);
    AddBits<S, 2>(r.bits[g], pitch, w);
  }
  static void Scales(const RecordQ3_K& r, int g, ptrdiff_t pitch, GroupScales<S>* s) {
    Load<S>(r, g, pitch, s);
  }
};

template <class S>
struct Unpack<S, RecordQ4_K> : MinSuperblock32 {
  static constexpr int kChain = 8;
  static void Weights(const RecordQ4_K& r, int g, ptrdiff_t pitch, typename S::Bytes* w) {
    UnpackNibbles<S>(r.nibbles[g], pitch, w);
  }
  static void Scales(const RecordQ4_K& r, int g, ptrdiff_t pitch, GroupScales<S>* s) {
    Load<S>(r, g, pitch, s);
  }
};

template <class S>
struct Unpack<S, RecordQ5_K> : MinSuperblock32 {
  static constexpr int kChain = 4;
  static void Weights(const RecordQ5_K& r, int g, ptrdiff_t pitch, typename S::Bytes* w) {
    UnpackNibbles<S>(r.nibbles[g], pitch, w);
    AddBits<S, 4>(r.bits[g], pitch, w);
  }
  static void Scales(const RecordQ5_K& r, int g, ptrdiff_t pitch, GroupScales<S>* s) {
    Load<S>(r, g, pitch, s);
  }
};

template <class S>
struct Unpack<S, RecordQ6_K> : SymmetricSuperblock16 {
  static constexpr int kChain = 2;
  static void Weights(const RecordQ6_K& r, int g, ptrdiff_t pitch, typename S::Bytes* w) {
    UnpackNibbles<S>(r.nibbles[g], pitch, w);
    AddPairs<S>(r.pairs[g], pitch, w);
  }
  static void Scales(const RecordQ6_K& r, int g, ptrdiff_t pitch, GroupScales<S>* s) {
    Load<S>(r, g, pitch, s);
  }
};

// Columns of float weights: 8 rows of one column.
template <class S>
typename S::Floats LoadColumn(const RecordF32& r, ptrdiff_t pitch) {
  return S::Load(r.values, pitch);
}
template <class S>
typename S::Floats LoadColumn(const RecordF16& r, ptrdiff_t pitch) {
  return S::LoadHalf(r.values, pitch);
}
template <class S>
typename S::Floats LoadColumn(const RecordBF16& r, ptrdiff_t pitch) {
  return S::LoadBrain(r.values, pitch);
}

}  // namespace stagecoach::cpu

#endif  // STAGECOACH_KERNELS_CPU_UNPACK_H_
