// From a packed record (records.h) to vectors of weights and scales, one group of 32 columns at a
// time. S: PortableSimd or Avx2Simd.
#ifndef STAGECOACH_KERNELS_CPU_UNPACK_H_
#define STAGECOACH_KERNELS_CPU_UNPACK_H_

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
  typename S::Words scale[2];  // of columns 0..15 and 16..31; [0] of all 32 if kHalves is 1
  typename S::Floats min[2];   // likewise
  typename S::Floats delta;
};

template <class S>
inline void UnpackNibbles(const uint8_t* nibbles, typename S::Bytes* w) {
  STAGECOACH_UNROLL
  for (int i = 0; i < 4; ++i) {
    const auto packed = S::LoadBytes(nibbles + 32 * i);
    w[i] = S::template ShiftMask<0>(packed, 0x0f);
    w[i + 4] = S::template ShiftMask<4>(packed, 0x0f);
  }
}

// 2 bits each.
template <class S>
inline void UnpackPairs(const uint8_t* pairs, typename S::Bytes* w) {
  STAGECOACH_UNROLL
  for (int i = 0; i < 2; ++i) {
    const auto packed = S::LoadBytes(pairs + 32 * i);
    w[4 * i] = S::template ShiftMask<0>(packed, 3);
    w[4 * i + 1] = S::template ShiftMask<2>(packed, 3);
    w[4 * i + 2] = S::template ShiftMask<4>(packed, 3);
    w[4 * i + 3] = S::template ShiftMask<6>(packed, 3);
  }
}

// ORs 2 bits each at bit 4 of the result.
template <class S>
inline void AddPairs(const uint8_t* pairs, typename S::Bytes* w) {
  STAGECOACH_UNROLL
  for (int i = 0; i < 2; ++i) {
    const auto packed = S::LoadBytes(pairs + 32 * i);
    w[4 * i] = S::Or(w[4 * i], S::template ShiftMask<-4>(packed, 0x30));
    w[4 * i + 1] = S::Or(w[4 * i + 1], S::template ShiftMask<-2>(packed, 0x30));
    w[4 * i + 2] = S::Or(w[4 * i + 2], S::template ShiftMask<0>(packed, 0x30));
    w[4 * i + 3] = S::Or(w[4 * i + 3], S::template ShiftMask<2>(packed, 0x30));
  }
}

// ORs one bit each at bit kAt of the result.
template <class S, int kAt>
inline void AddBits(const uint8_t* bits, typename S::Bytes* w) {
  constexpr uint8_t kMask = 1 << kAt;
  const auto packed = S::LoadBytes(bits);
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
template <class S, class Record>
struct Unpack;

struct SymmetricBlock32 {
  static constexpr int kHalves = 1;
  static constexpr bool kUnitScale = true, kMin = true, kSigned = false;
  template <class S, class Record>
  static void Load(const Record& r, GroupScales<S>* s) {
    s->delta = S::LoadHalf(r.d);
    s->min[0] = S::Mul(s->delta, S::Set(Record::kOffset));
  }
};
struct MinBlock32 {
  static constexpr int kHalves = 1;
  static constexpr bool kUnitScale = true, kMin = true, kSigned = false;
  template <class S, class Record>
  static void Load(const Record& r, GroupScales<S>* s) {
    s->delta = S::LoadHalf(r.d);
    s->min[0] = S::LoadHalf(r.d_min);
  }
};
struct MinSuperblock32 {  // Q4_K, Q5_K
  static constexpr int kHalves = 1;
  static constexpr bool kUnitScale = false, kMin = true, kSigned = false;
  template <class S, class Record>
  static void Load(const Record& r, int g, GroupScales<S>* s) {
    s->delta = S::LoadHalf(r.d);
    s->scale[0] = S::ScaleWordsUnsigned(r.scales[g]);
    s->min[0] = S::Mul(S::FloatsFromUnsigned(r.mins[g]), S::LoadHalf(r.d_min));
  }
};
struct SymmetricSuperblock16 {  // Q3_K, Q6_K
  static constexpr int kHalves = 2;
  static constexpr bool kUnitScale = false, kMin = true, kSigned = false;
  template <class S, class Record>
  static void Load(const Record& r, int g, GroupScales<S>* s) {
    s->delta = S::LoadHalf(r.d);
    const auto unit = S::Mul(s->delta, S::Set(Record::kOffset));
    for (int h = 0; h < 2; ++h) {
      s->scale[h] = S::ScaleWordsSigned(r.scales[2 * g + h]);
      s->min[h] = S::Mul(S::FloatsFromSigned(r.scales[2 * g + h]), unit);
    }
  }
};

template <class S>
struct Unpack<S, RecordQ4_0> : SymmetricBlock32 {
  static constexpr int kChain = 8;
  static void Weights(const RecordQ4_0& r, int g, typename S::Bytes* w) {
    UnpackNibbles<S>(r.nibbles[g], w);
  }
  static void Scales(const RecordQ4_0& r, int, GroupScales<S>* s) { Load<S>(r, s); }
};

template <class S>
struct Unpack<S, RecordQ4_1> : MinBlock32 {
  static constexpr int kChain = 8;
  static void Weights(const RecordQ4_1& r, int g, typename S::Bytes* w) {
    UnpackNibbles<S>(r.nibbles[g], w);
  }
  static void Scales(const RecordQ4_1& r, int, GroupScales<S>* s) { Load<S>(r, s); }
};

template <class S>
struct Unpack<S, RecordQ5_0> : SymmetricBlock32 {
  static constexpr int kChain = 4;
  static void Weights(const RecordQ5_0& r, int g, typename S::Bytes* w) {
    UnpackNibbles<S>(r.nibbles[g], w);
    AddBits<S, 4>(r.bits[g], w);
  }
  static void Scales(const RecordQ5_0& r, int, GroupScales<S>* s) { Load<S>(r, s); }
};

template <class S>
struct Unpack<S, RecordQ5_1> : MinBlock32 {
  static constexpr int kChain = 4;
  static void Weights(const RecordQ5_1& r, int g, typename S::Bytes* w) {
    UnpackNibbles<S>(r.nibbles[g], w);
    AddBits<S, 4>(r.bits[g], w);
  }
  static void Scales(const RecordQ5_1& r, int, GroupScales<S>* s) { Load<S>(r, s); }
};

template <class S>
struct Unpack<S, RecordQ8_0> {
  static constexpr int kHalves = 1, kChain = 1;
  static constexpr bool kUnitScale = true, kMin = false, kSigned = true;
  static void Weights(const RecordQ8_0& r, int g, typename S::Bytes* w) {
    STAGECOACH_UNROLL
    for (int j = 0; j < 8; ++j) w[j] = S::LoadBytes(r.quants[g] + 32 * j);
  }
  static void Scales(const RecordQ8_0& r, int, GroupScales<S>* s) { s->delta = S::LoadHalf(r.d); }
};

template <class S>
struct Unpack<S, RecordQ2_K> {
  static constexpr int kHalves = 2, kChain = 4;
  static constexpr bool kUnitScale = false, kMin = true, kSigned = false;
  static void Weights(const RecordQ2_K& r, int g, typename S::Bytes* w) {
    UnpackPairs<S>(r.pairs[g], w);
  }
  static void Scales(const RecordQ2_K& r, int g, GroupScales<S>* s) {
    s->delta = S::LoadHalf(r.d);
    const auto d_min = S::LoadHalf(r.d_min);
    for (int h = 0; h < 2; ++h) {
      s->scale[h] = S::ScaleWordsLowNibble(r.scales_and_mins[2 * g + h]);
      s->min[h] = S::Mul(S::FloatsFromHighNibble(r.scales_and_mins[2 * g + h]), d_min);
    }
  }
};

template <class S>
struct Unpack<S, RecordQ3_K> : SymmetricSuperblock16 {
  static constexpr int kChain = 4;
  static void Weights(const RecordQ3_K& r, int g, typename S::Bytes* w) {
    UnpackPairs<S>(r.pairs[g], w);
    AddBits<S, 2>(r.bits[g], w);
  }
  static void Scales(const RecordQ3_K& r, int g, GroupScales<S>* s) { Load<S>(r, g, s); }
};

template <class S>
struct Unpack<S, RecordQ4_K> : MinSuperblock32 {
  static constexpr int kChain = 8;
  static void Weights(const RecordQ4_K& r, int g, typename S::Bytes* w) {
    UnpackNibbles<S>(r.nibbles[g], w);
  }
  static void Scales(const RecordQ4_K& r, int g, GroupScales<S>* s) { Load<S>(r, g, s); }
};

template <class S>
struct Unpack<S, RecordQ5_K> : MinSuperblock32 {
  static constexpr int kChain = 4;
  static void Weights(const RecordQ5_K& r, int g, typename S::Bytes* w) {
    UnpackNibbles<S>(r.nibbles[g], w);
    AddBits<S, 4>(r.bits[g], w);
  }
  static void Scales(const RecordQ5_K& r, int g, GroupScales<S>* s) { Load<S>(r, g, s); }
};

template <class S>
struct Unpack<S, RecordQ6_K> : SymmetricSuperblock16 {
  static constexpr int kChain = 2;
  static void Weights(const RecordQ6_K& r, int g, typename S::Bytes* w) {
    UnpackNibbles<S>(r.nibbles[g], w);
    AddPairs<S>(r.pairs[g], w);
  }
  static void Scales(const RecordQ6_K& r, int g, GroupScales<S>* s) { Load<S>(r, g, s); }
};

// Columns of float weights: 8 rows of one column.
template <class S>
typename S::Floats LoadColumn(const RecordF32& r) {
  return S::Load(r.values);
}
template <class S>
typename S::Floats LoadColumn(const RecordF16& r) {
  return S::LoadHalf(r.values);
}
template <class S>
typename S::Floats LoadColumn(const RecordBF16& r) {
  return S::LoadBrain(r.values);
}

}  // namespace stagecoach::cpu

#endif  // STAGECOACH_KERNELS_CPU_UNPACK_H_
