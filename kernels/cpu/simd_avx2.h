// The vector operations of the kernels with AVX2 and F16C. What each does is told in
// simd_portable.h, which gives the same bits. Only for files compiled with these instructions.
#ifndef STAGECOACH_KERNELS_CPU_SIMD_AVX2_H_
#define STAGECOACH_KERNELS_CPU_SIMD_AVX2_H_

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace stagecoach::cpu {

struct Avx2Simd {
  // Distinct types, so that overloads tell them apart.
  struct Bytes {
    __m256i v;
  };
  struct Words {
    __m256i v;
  };
  struct Ints {
    __m256i v;
  };
  struct Floats {
    __m256 v;
  };
  using Scales = Words;  // of one half of a group
  static constexpr int kPanels = 1, kLanes = 8;
  static constexpr bool kByteDots = false;  // no AddDot

  static Bytes LoadBytes(const uint8_t* p, ptrdiff_t = 0) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
  }
  static Bytes Broadcast4(const int8_t* p) {
    int32_t word;
    std::memcpy(&word, p, 4);
    return {_mm256_set1_epi32(word)};
  }
  template <int kShift>
  static Bytes ShiftMask(Bytes b, uint8_t mask) {
    const __m256i masks = _mm256_set1_epi8(static_cast<char>(mask));
    if constexpr (kShift > 0) {
      return {_mm256_and_si256(_mm256_srli_epi16(b.v, kShift), masks)};
    } else if constexpr (kShift < 0) {
      return {_mm256_and_si256(_mm256_slli_epi16(b.v, -kShift), masks)};
    } else {
      return {_mm256_and_si256(b.v, masks)};
    }
  }
  static Bytes Or(Bytes a, Bytes b) { return {_mm256_or_si256(a.v, b.v)}; }
  static Bytes Abs(Bytes a) { return {_mm256_abs_epi8(a.v)}; }
  static Bytes Sign(Bytes a, Bytes s) { return {_mm256_sign_epi8(a.v, s.v)}; }

  static Words MulAddBytes(Bytes u, Bytes s) { return {_mm256_maddubs_epi16(u.v, s.v)}; }
  static Words Add(Words a, Words b) {
    __m256i sum = _mm256_add_epi16(a.v, b.v);
    // Left alone, compilers turn a chain of these into a tree whose leaves overflow the registers.
    asm("" : "+x"(sum));
    return {sum};
  }
  static Ints MulAddWords(Words a, Words b) { return {_mm256_madd_epi16(a.v, b.v)}; }
  static Ints Add(Ints a, Ints b) { return {_mm256_add_epi32(a.v, b.v)}; }
  static Scales ScalesUnsigned(const uint8_t* p, ptrdiff_t = 0) {
    return {SpreadLow(Broadcast8(p))};
  }
  static Scales ScalesSigned(const uint8_t* p, ptrdiff_t = 0) {
    const __m256i high = _mm256_shuffle_epi8(
        Broadcast8(p), _mm256_setr_epi8(-1, 0, -1, 0, -1, 1, -1, 1, -1, 2, -1, 2, -1, 3, -1, 3, -1,
                                        4, -1, 4, -1, 5, -1, 5, -1, 6, -1, 6, -1, 7, -1, 7));
    return {_mm256_srai_epi16(high, 8)};
  }
  static Scales ScalesLowNibble(const uint8_t* p, ptrdiff_t = 0) {
    return {SpreadLow(_mm256_and_si256(Broadcast8(p), _mm256_set1_epi8(15)))};
  }
  static Words OneWords() { return {_mm256_set1_epi16(1)}; }
  static void Store(Words w, int16_t* p) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), w.v);
  }
  static Words LoadWords(const int16_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
  }
  static void Store(Bytes b, uint8_t* p) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), b.v);
  }

  static Floats Load(const float* p, ptrdiff_t = 0) { return {_mm256_loadu_ps(p)}; }
  static void Store(Floats f, float* p) { _mm256_storeu_ps(p, f.v); }
  static Floats Set(float x) { return {_mm256_set1_ps(x)}; }
  static Floats Add(Floats a, Floats b) { return {_mm256_add_ps(a.v, b.v)}; }
  static Floats Sub(Floats a, Floats b) { return {_mm256_sub_ps(a.v, b.v)}; }
  static Floats Mul(Floats a, Floats b) { return {_mm256_mul_ps(a.v, b.v)}; }
  static Floats Div(Floats a, Floats b) { return {_mm256_div_ps(a.v, b.v)}; }
  static Floats Max(Floats a, Floats b) { return {_mm256_max_ps(a.v, b.v)}; }
  static Floats Min(Floats a, Floats b) { return {_mm256_min_ps(a.v, b.v)}; }
  static Floats ToFloats(Ints a) { return {_mm256_cvtepi32_ps(a.v)}; }
  static Ints Round(Floats a) { return {_mm256_cvtps_epi32(a.v)}; }
  static Floats PowerOfTwo(Ints a) {
    return {
        _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(a.v, _mm256_set1_epi32(127)), 23))};
  }
  static Floats FloatsFromUnsigned(const uint8_t* p, ptrdiff_t = 0) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(Load8(p)))};
  }
  static Floats FloatsFromSigned(const uint8_t* p, ptrdiff_t = 0) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(Load8(p)))};
  }
  static Floats FloatsFromHighNibble(const uint8_t* p, ptrdiff_t = 0) {
    return {_mm256_cvtepi32_ps(_mm256_srli_epi32(_mm256_cvtepu8_epi32(Load8(p)), 4))};
  }
  static Floats LoadHalf(const uint16_t* p, ptrdiff_t = 0) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  static Floats LoadBrain(const uint16_t* p, ptrdiff_t = 0) {
    const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16))};
  }
  static void StoreHalf(Floats f, uint16_t* p) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph(f.v, _MM_FROUND_TO_NEAREST_INT));
  }
  static Floats Turn(Floats pairs, Floats turns) {
    const __m256 along = _mm256_mul_ps(pairs.v, _mm256_moveldup_ps(turns.v));
    const __m256 swapped = _mm256_permute_ps(pairs.v, 0xb1);
    return {_mm256_addsub_ps(along, _mm256_mul_ps(swapped, _mm256_movehdup_ps(turns.v)))};
  }
  static uint32_t MaxMagnitudeBits(const float* p, int count) {
    const __m256i mask = _mm256_set1_epi32(0x7fffffff);
    __m256i most = _mm256_setzero_si256();
    for (int i = 0; i < count; i += 8) {
      const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + i));
      most = _mm256_max_epi32(most, _mm256_and_si256(bits, mask));
    }
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(m));
  }
  static void StoreAsBytes(const Ints* a, int8_t* p) {
    const __m256i words_ab = _mm256_packs_epi32(a[0].v, a[1].v);
    const __m256i words_cd = _mm256_packs_epi32(a[2].v, a[3].v);
    const __m256i bytes = _mm256_packs_epi16(words_ab, words_cd);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permutevar8x32_epi32(bytes, order));
  }
  static int32_t Sum(Ints a) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(a.v), _mm256_extracti128_si256(a.v, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1));
    return _mm_cvtsi128_si32(s);
  }
  static float Sum(Floats f) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(f.v), _mm256_extractf128_ps(f.v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }

 private:
  static __m128i Load8(const uint8_t* p) {
    return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  }
  static __m256i Broadcast8(const uint8_t* p) {
    int64_t bytes;
    std::memcpy(&bytes, p, 8);
    return _mm256_set1_epi64x(bytes);
  }
  // Byte r of each 8 into both words of lane r.
  static __m256i SpreadLow(__m256i bytes) {
    return _mm256_shuffle_epi8(
        bytes, _mm256_setr_epi8(0, -1, 0, -1, 1, -1, 1, -1, 2, -1, 2, -1, 3, -1, 3, -1, 4, -1, 4,
                                -1, 5, -1, 5, -1, 6, -1, 6, -1, 7, -1, 7, -1));
  }
};

}  // namespace stagecoach::cpu

#endif  // STAGECOACH_KERNELS_CPU_SIMD_AVX2_H_
