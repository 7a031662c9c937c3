// The vector operations of the kernels with AVX-512 and its byte products (VNNI), 16 lanes wide:
// panels are taken in pairs. What each does is told in simd_portable.h. Only
// for files compiled with these instructions.
#ifndef STAGECOACH_KERNELS_CPU_SIMD_AVX512_H_
#define STAGECOACH_KERNELS_CPU_SIMD_AVX512_H_

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace stagecoach::cpu {

struct Avx512Simd {
  struct Bytes {
    __m512i v;
  };
  struct Ints {
    __m512i v;
  };
  struct Floats {
    __m512 v;
  };
  using Scales = Floats;
  static constexpr int kPanels = 2, kLanes = 16;
  static constexpr bool kByteDots = true;

  // --- From two panels: the second `pitch` bytes behind the first.
  static Bytes LoadBytes(const uint8_t* p, ptrdiff_t pitch) {
    const __m512i low = _mm512_castsi256_si512(Load32(p));
    return {_mm512_inserti64x4(low, Load32(p + pitch), 1)};
  }
  static Floats Load(const float* p, ptrdiff_t pitch) {
    const __m512d low = _mm512_castpd256_pd512(_mm256_castps_pd(_mm256_loadu_ps(p)));
    const __m256 high = _mm256_loadu_ps(Behind(p, pitch));
    return {_mm512_castpd_ps(_mm512_insertf64x4(low, _mm256_castps_pd(high), 1))};
  }
  static Floats LoadHalf(const uint16_t* p, ptrdiff_t pitch) {
    return {_mm512_cvtph_ps(LoadWords(p, pitch))};
  }
  static Floats LoadBrain(const uint16_t* p, ptrdiff_t pitch) {
    const __m512i words = _mm512_cvtepu16_epi32(LoadWords(p, pitch));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(words, 16))};
  }
  static Floats FloatsFromUnsigned(const uint8_t* p, ptrdiff_t pitch) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(Load8(p, pitch)))};
  }
  static Floats FloatsFromSigned(const uint8_t* p, ptrdiff_t pitch) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(Load8(p, pitch)))};
  }
  static Floats FloatsFromHighNibble(const uint8_t* p, ptrdiff_t pitch) {
    const __m512i bytes = _mm512_cvtepu8_epi32(Load8(p, pitch));
    return {_mm512_cvtepi32_ps(_mm512_srli_epi32(bytes, 4))};
  }
  static Scales ScalesUnsigned(const uint8_t* p, ptrdiff_t pitch) {
    return FloatsFromUnsigned(p, pitch);
  }
  static Scales ScalesSigned(const uint8_t* p, ptrdiff_t pitch) {
    return FloatsFromSigned(p, pitch);
  }
  static Scales ScalesLowNibble(const uint8_t* p, ptrdiff_t pitch) {
    const __m512i bytes = _mm512_cvtepu8_epi32(Load8(p, pitch));
    return {_mm512_cvtepi32_ps(_mm512_and_si512(bytes, _mm512_set1_epi32(15)))};
  }

  // --- Bytes.
  static Bytes Broadcast4(const int8_t* p) {
    int32_t word;
    std::memcpy(&word, p, 4);
    return {_mm512_set1_epi32(word)};
  }
  template <int kShift>
  static Bytes ShiftMask(Bytes b, uint8_t mask) {
    const __m512i masks = _mm512_set1_epi8(static_cast<char>(mask));
    if constexpr (kShift > 0) {
      return {_mm512_and_si512(_mm512_srli_epi16(b.v, kShift), masks)};
    } else if constexpr (kShift < 0) {
      return {_mm512_and_si512(_mm512_slli_epi16(b.v, -kShift), masks)};
    } else {
      return {_mm512_and_si512(b.v, masks)};
    }
  }
  static Bytes Or(Bytes a, Bytes b) { return {_mm512_or_si512(a.v, b.v)}; }

  // --- Integers.
  static Ints ZeroInts() { return {_mm512_setzero_si512()}; }
  static Ints Add(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
  static int32_t Sum(Ints a) { return _mm512_reduce_add_epi32(a.v); }
  static void StoreAsBytes(const Ints* a, int8_t* p) {
    for (int i = 0; i < 2; ++i) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p) + i, _mm512_cvtsepi32_epi8(a[i].v));
    }
  }
  // sum + u (unsigned) times s (signed), the four of a lane added.
  static Ints AddDot(Ints sum, Bytes u, Bytes s) { return {_mm512_dpbusd_epi32(sum.v, u.v, s.v)}; }
  // The same for a signed first factor: of its magnitude, with the sign at the second.
  static Ints AddSignedDot(Ints sum, Bytes a, Bytes s) {
    const __mmask64 negative = _mm512_movepi8_mask(a.v);
    const __m512i signed_s = _mm512_mask_sub_epi8(s.v, negative, _mm512_setzero_si512(), s.v);
    return {_mm512_dpbusd_epi32(sum.v, _mm512_abs_epi8(a.v), signed_s)};
  }

  // --- Floats.
  static Floats Load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Floats LoadHalf(const uint16_t* p) {
    return {_mm512_cvtph_ps(Load32(reinterpret_cast<const uint8_t*>(p)))};
  }
  static Floats FloatsFromSigned(const uint8_t* p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))};
  }
  static void Store(Floats f, float* p) { _mm512_storeu_ps(p, f.v); }
  static Floats Set(float x) { return {_mm512_set1_ps(x)}; }
  static Floats Add(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
  static Floats Sub(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
  static Floats Mul(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
  static Floats Div(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
  static Floats Max(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
  static Floats Min(Floats a, Floats b) { return {_mm512_min_ps(a.v, b.v)}; }
  static Floats ToFloats(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }
  static Ints Round(Floats a) { return {_mm512_cvtps_epi32(a.v)}; }
  static Floats PowerOfTwo(Ints a) {
    const __m512i exponents = _mm512_add_epi32(a.v, _mm512_set1_epi32(127));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(exponents, 23))};
  }
  static void StoreHalf(Floats f, uint16_t* p) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(f.v, _MM_FROUND_TO_NEAREST_INT));
  }
  static Floats Turn(Floats pairs, Floats turns) {
    const __m512 along = _mm512_mul_ps(pairs.v, _mm512_moveldup_ps(turns.v));
    const __m512 swapped = _mm512_permute_ps(pairs.v, 0xb1);
    const __m512 across = _mm512_mul_ps(swapped, _mm512_movehdup_ps(turns.v));
    constexpr __mmask16 kEven = 0x5555;
    return {_mm512_mask_sub_ps(_mm512_add_ps(along, across), kEven, along, across)};
  }
  static uint32_t MaxMagnitudeBits(const float* p, int count) {
    const __m512i mask = _mm512_set1_epi32(0x7fffffff);
    __m512i most = _mm512_setzero_si512();
    for (int i = 0; i < count; i += 16) {
      most = _mm512_max_epi32(most, _mm512_and_si512(_mm512_loadu_si512(p + i), mask));
    }
    return static_cast<uint32_t>(_mm512_reduce_max_epi32(most));
  }
  // Both halves added, and then as with 8 lanes.
  static float Sum(Floats f) {
    const __m256 high = _mm512_extractf32x8_ps(f.v, 1);
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(f.v), high);
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }

 private:
  template <typename T>
  static const T* Behind(const T* p, ptrdiff_t pitch) {
    return reinterpret_cast<const T*>(reinterpret_cast<const uint8_t*>(p) + pitch);
  }
  static __m256i Load32(const uint8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static __m256i LoadWords(const uint16_t* p, ptrdiff_t pitch) {
    const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(Behind(p, pitch)));
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
  }
  static __m128i Load8(const uint8_t* p, ptrdiff_t pitch) {
    return _mm_unpacklo_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)),
                              _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + pitch)));
  }
};

}  // namespace stagecoach::cpu

#endif  // STAGECOACH_KERNELS_CPU_SIMD_AVX512_H_
