// The vector operations of the kernels in plain C++. Same results, bit for bit, as simd_avx2.h.
// What loads from packed weights has a last parameter for S::kPanels == 2: how many bytes behind p
// the second panel lies.
#ifndef STAGECOACH_KERNELS_CPU_SIMD_PORTABLE_H_
#define STAGECOACH_KERNELS_CPU_SIMD_PORTABLE_H_

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "model/half.h"

namespace stagecoach::cpu {

struct PortableSimd {
  struct Bytes {
    uint8_t v[32];
  };
  struct Words {
    int16_t v[16];
  };
  struct Ints {
    int32_t v[8];
  };
  struct Floats {
    float v[8];
  };
  using Scales = Words;  // of one half of a group
  static constexpr int kPanels = 1, kLanes = 8;
  static constexpr bool kByteDots = false;  // no AddDot

  // --- Bytes: lane r = bytes 4r .. 4r + 3.
  static Bytes LoadBytes(const uint8_t* p, ptrdiff_t = 0) {
    Bytes b;
    std::memcpy(b.v, p, 32);
    return b;
  }
  // The same 4 bytes in every lane.
  static Bytes Broadcast4(const int8_t* p) {
    Bytes b;
    for (int i = 0; i < 32; ++i) b.v[i] = static_cast<uint8_t>(p[i % 4]);
    return b;
  }
  // (b >> kShift, or b << -kShift) & mask in each byte.
  template <int kShift>
  static Bytes ShiftMask(Bytes b, uint8_t mask) {
    for (uint8_t& x : b.v) {
      x = static_cast<uint8_t>((kShift >= 0 ? x >> (kShift & 7) : x << (-kShift & 7)) & mask);
    }
    return b;
  }
  static Bytes Or(Bytes a, Bytes b) {
    for (int i = 0; i < 32; ++i) a.v[i] |= b.v[i];
    return a;
  }
  static Bytes Abs(Bytes a) {
    for (uint8_t& x : a.v) x = static_cast<int8_t>(x) < 0 ? static_cast<uint8_t>(0 - x) : x;
    return a;
  }
  // a with the sign of s applied: -a where s < 0, 0 where s == 0.
  static Bytes Sign(Bytes a, Bytes s) {
    for (int i = 0; i < 32; ++i) {
      const int8_t sign = static_cast<int8_t>(s.v[i]);
      a.v[i] = sign < 0 ? static_cast<uint8_t>(0 - a.v[i]) : sign == 0 ? uint8_t{0} : a.v[i];
    }
    return a;
  }

  // --- Integer products.
  // u (unsigned) times s (signed), neighbours added. The sums must fit int16.
  static Words MulAddBytes(Bytes u, Bytes s) {
    Words w;
    for (int i = 0; i < 16; ++i) {
      w.v[i] = static_cast<int16_t>(u.v[2 * i] * static_cast<int8_t>(s.v[2 * i]) +
                                    u.v[2 * i + 1] * static_cast<int8_t>(s.v[2 * i + 1]));
    }
    return w;
  }
  static Words Add(Words a, Words b) {
    for (int i = 0; i < 16; ++i) a.v[i] = static_cast<int16_t>(a.v[i] + b.v[i]);
    return a;
  }
  static Ints MulAddWords(Words a, Words b) {
    Ints r;
    for (int i = 0; i < 8; ++i) {
      r.v[i] = a.v[2 * i] * b.v[2 * i] + a.v[2 * i + 1] * b.v[2 * i + 1];
    }
    return r;
  }
  static Ints Add(Ints a, Ints b) {
    for (int i = 0; i < 8; ++i) a.v[i] += b.v[i];
    return a;
  }
  // 8 bytes to 8 lanes of two equal words.
  static Scales ScalesUnsigned(const uint8_t* p, ptrdiff_t = 0) {
    Words w;
    for (int i = 0; i < 16; ++i) w.v[i] = p[i / 2];
    return w;
  }
  static Scales ScalesSigned(const uint8_t* p, ptrdiff_t = 0) {
    Words w;
    for (int i = 0; i < 16; ++i) w.v[i] = static_cast<int8_t>(p[i / 2]);
    return w;
  }
  static Scales ScalesLowNibble(const uint8_t* p, ptrdiff_t = 0) {
    Words w;
    for (int i = 0; i < 16; ++i) w.v[i] = p[i / 2] & 15;
    return w;
  }
  static Words OneWords() {
    Words w;
    for (int16_t& x : w.v) x = 1;
    return w;
  }
  static void Store(Words w, int16_t* p) { std::memcpy(p, w.v, sizeof(w.v)); }
  static Words LoadWords(const int16_t* p) {
    Words w;
    std::memcpy(w.v, p, sizeof(w.v));
    return w;
  }
  static void Store(Bytes b, uint8_t* p) { std::memcpy(p, b.v, sizeof(b.v)); }

  // --- Floats.
  static Floats Load(const float* p, ptrdiff_t = 0) {
    Floats f;
    std::memcpy(f.v, p, sizeof(f.v));
    return f;
  }
  static void Store(Floats f, float* p) { std::memcpy(p, f.v, sizeof(f.v)); }
  static Floats Set(float x) {
    Floats f;
    for (float& y : f.v) y = x;
    return f;
  }
  static Floats Add(Floats a, Floats b) {
    for (int i = 0; i < 8; ++i) a.v[i] += b.v[i];
    return a;
  }
  static Floats Sub(Floats a, Floats b) {
    for (int i = 0; i < 8; ++i) a.v[i] -= b.v[i];
    return a;
  }
  static Floats Mul(Floats a, Floats b) {
    for (int i = 0; i < 8; ++i) a.v[i] *= b.v[i];
    return a;
  }
  static Floats Div(Floats a, Floats b) {
    for (int i = 0; i < 8; ++i) a.v[i] /= b.v[i];
    return a;
  }
  // b where either is NaN.
  static Floats Max(Floats a, Floats b) {
    for (int i = 0; i < 8; ++i) a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
    return a;
  }
  static Floats Min(Floats a, Floats b) {
    for (int i = 0; i < 8; ++i) a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
    return a;
  }
  static Floats ToFloats(Ints a) {
    Floats f;
    for (int i = 0; i < 8; ++i) f.v[i] = static_cast<float>(a.v[i]);
    return f;
  }
  // Nearest even; |a| < 2^22.
  static Ints Round(Floats a) {
    Ints r;
    for (int i = 0; i < 8; ++i) {
      const float shifted = a.v[i] + 12582912.0f;  // 1.5 * 2^23: the mantissa is the integer
      uint32_t bits;
      std::memcpy(&bits, &shifted, 4);
      r.v[i] = static_cast<int32_t>(bits - 0x4b400000u);
    }
    return r;
  }
  // 2^a for integers in [-126, 127].
  static Floats PowerOfTwo(Ints a) {
    Floats f;
    for (int i = 0; i < 8; ++i) {
      const uint32_t bits = (static_cast<uint32_t>(a.v[i]) + 127u) << 23;
      std::memcpy(&f.v[i], &bits, 4);
    }
    return f;
  }
  static Floats FloatsFromUnsigned(const uint8_t* p, ptrdiff_t = 0) {
    Floats f;
    for (int i = 0; i < 8; ++i) f.v[i] = p[i];
    return f;
  }
  static Floats FloatsFromSigned(const uint8_t* p, ptrdiff_t = 0) {
    Floats f;
    for (int i = 0; i < 8; ++i) f.v[i] = static_cast<int8_t>(p[i]);
    return f;
  }
  static Floats FloatsFromHighNibble(const uint8_t* p, ptrdiff_t = 0) {
    Floats f;
    for (int i = 0; i < 8; ++i) f.v[i] = static_cast<float>(p[i] >> 4);
    return f;
  }
  static Floats LoadHalf(const uint16_t* p, ptrdiff_t = 0) {
    Floats f;
    for (int i = 0; i < 8; ++i) f.v[i] = stagecoach::HalfToFloat(p[i]);
    return f;
  }
  static Floats LoadBrain(const uint16_t* p, ptrdiff_t = 0) {
    Floats f;
    for (int i = 0; i < 8; ++i) {
      const uint32_t bits = static_cast<uint32_t>(p[i]) << 16;
      std::memcpy(&f.v[i], &bits, 4);
    }
    return f;
  }
  static void StoreHalf(Floats f, uint16_t* p) {
    for (int i = 0; i < 8; ++i) p[i] = stagecoach::FloatToHalf(f.v[i]);
  }
  // Turns pairs of lanes (x, y) by pairs (cos, sin): (x cos - y sin, y cos + x sin).
  static Floats Turn(Floats pairs, Floats turns) {
    Floats f;
    for (int i = 0; i < 8; i += 2) {
      const float x = pairs.v[i], y = pairs.v[i + 1];
      f.v[i] = x * turns.v[i] - y * turns.v[i + 1];
      f.v[i + 1] = y * turns.v[i] + x * turns.v[i + 1];
    }
    return f;
  }
  // Largest magnitude, as bits with the sign cleared: NaN and Inf are >= 0x7f800000.
  // count: a multiple of kLanes.
  static uint32_t MaxMagnitudeBits(const float* p, int count) {
    uint32_t most = 0;
    for (int i = 0; i < count; ++i) {
      uint32_t bits;
      std::memcpy(&bits, &p[i], 4);
      bits &= 0x7fffffffu;
      if (bits > most) most = bits;
    }
    return most;
  }
  // 32 integers within int8, of as many vectors as they fill.
  static void StoreAsBytes(const Ints* a, int8_t* p) {
    for (int i = 0; i < 32; ++i) p[i] = static_cast<int8_t>(a[i / 8].v[i % 8]);
  }
  static int32_t Sum(Ints a) {
    int32_t sum = 0;
    for (int32_t x : a.v) sum += x;
    return sum;
  }
  // ((0 + 4) + (2 + 6)) + ((1 + 5) + (3 + 7))
  static float Sum(Floats f) {
    const float a = f.v[0] + f.v[4], b = f.v[1] + f.v[5], c = f.v[2] + f.v[6], d = f.v[3] + f.v[7];
    return (a + c) + (b + d);
  }
};

}  // namespace stagecoach::cpu

#endif  // STAGECOACH_KERNELS_CPU_SIMD_PORTABLE_H_
