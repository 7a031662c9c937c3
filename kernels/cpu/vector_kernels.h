// Quantising, norm, activation function, rotation and half conversion. S: PortableSimd, Avx2Simd or
// Avx512Simd. Sums run over 16 columns side by side whatever S::kLanes is.
#ifndef STAGECOACH_KERNELS_CPU_VECTOR_KERNELS_H_
#define STAGECOACH_KERNELS_CPU_VECTOR_KERNELS_H_

#include <cstdint>
#include <cstring>

#include "kernels/cpu/cpu_kernels.h"
#include "kernels/cpu/unpack.h"

namespace stagecoach::cpu {

template <class S>
void Quantize(const float* x, int columns, int8_t* quants, ActivationScale* scales) {
  constexpr int kVectors = kActivationBlock / S::kLanes;
  for (int k = 0; k < columns;
       k += kActivationBlock, x += kActivationBlock, quants += kActivationBlock, ++scales) {
    const uint32_t bits = S::MaxMagnitudeBits(x, kActivationBlock);
    float most;
    std::memcpy(&most, &bits, 4);
    if (!(most > 1e-30f && bits < 0x7f800000u)) {
      // Zeros stay zero; NaN and Inf make every sum over this block NaN.
      float scale = 0;
      if (bits >= 0x7f800000u) {
        constexpr uint32_t kNan = 0x7fc00000u;
        std::memcpy(&scale, &kNan, 4);
      }
      std::memset(quants, 0, kActivationBlock);
      *scales = {scale, scale, {scale, scale}};
      continue;
    }
    const float scale = most / 127.0f;
    const auto inverse = S::Set(127.0f / most);
    typename S::Ints q[kVectors];
    STAGECOACH_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      q[i] = S::Round(S::Mul(S::Load(x + S::kLanes * i), inverse));
    }
    S::StoreAsBytes(q, quants);
    auto first_half = q[0], second_half = q[kVectors / 2];
    STAGECOACH_UNROLL
    for (int i = 1; i < kVectors / 2; ++i) {
      first_half = S::Add(first_half, q[i]);
      second_half = S::Add(second_half, q[kVectors / 2 + i]);
    }
    const int32_t low = S::Sum(first_half), high = S::Sum(second_half);
    *scales = {scale,
               scale * static_cast<float>(low + high),
               {scale * static_cast<float>(low), scale * static_cast<float>(high)}};
  }
}

template <class S>
void QuantizeRest(const float* x, const int8_t* quants, const ActivationScale* scales, int columns,
                  int8_t* rest_quants, ActivationScale* rest_scales) {
  for (int k = 0; k < columns; k += kActivationBlock) {
    float rest[kActivationBlock];
    for (int i = 0; i < kActivationBlock; i += S::kLanes) {
      const auto q = S::FloatsFromSigned(reinterpret_cast<const uint8_t*>(quants) + k + i);
      const auto kept = S::Mul(S::Set(scales[k / kActivationBlock].scale), q);
      S::Store(S::Sub(S::Load(x + k + i), kept), rest + i);
    }
    Quantize<S>(rest, kActivationBlock, rest_quants + k, rest_scales + k / kActivationBlock);
  }
}

// e^x within a few units in the last place for -87 <= x <= 88, clamped outside; NaN stays NaN.
template <class S>
typename S::Floats Exp(typename S::Floats x) {
  x = S::Min(S::Set(88.0f), S::Max(S::Set(-87.0f), x));
  const auto power = S::Round(S::Mul(x, S::Set(1.44269504f)));
  const auto whole = S::ToFloats(power);
  // ln 2 in two parts: the first times a small integer is exact.
  auto rest = S::Sub(x, S::Mul(whole, S::Set(0.693359375f)));
  rest = S::Sub(rest, S::Mul(whole, S::Set(-2.12194440e-4f)));
  // Minimax polynomial of (e^r - 1 - r) / r^2 on |r| <= ln(2) / 2.
  auto sum = S::Set(1.9875691500e-4f);
  sum = S::Add(S::Mul(sum, rest), S::Set(1.3981999507e-3f));
  sum = S::Add(S::Mul(sum, rest), S::Set(8.3334519073e-3f));
  sum = S::Add(S::Mul(sum, rest), S::Set(4.1665795894e-2f));
  sum = S::Add(S::Mul(sum, rest), S::Set(1.6666665459e-1f));
  sum = S::Add(S::Mul(sum, rest), S::Set(5.0000001201e-1f));
  sum = S::Add(S::Mul(sum, S::Mul(rest, rest)), S::Add(rest, S::Set(1.0f)));
  return S::Mul(sum, S::PowerOfTwo(power));
}

template <class S>
float ExpOne(float x) {
  float y[S::kLanes];
  S::Store(Exp<S>(S::Set(x)), y);
  return y[0];
}

template <class S>
void RmsNorm(const float* x, int columns, const float* weight, float epsilon, float* y) {
  auto squares = S::Set(0), more = S::Set(0);  // the second for 8 lanes: of the last 8 columns
  int k = 0;
  for (; k + 16 <= columns; k += 16) {
    const auto u = S::Load(x + k);
    squares = S::Add(squares, S::Mul(u, u));
    if constexpr (S::kLanes == 8) {
      const auto v = S::Load(x + k + 8);
      more = S::Add(more, S::Mul(v, v));
    }
  }
  if constexpr (S::kLanes == 8) squares = S::Add(squares, more);
  float sum = S::Sum(squares);
  for (; k < columns; ++k) sum += x[k] * x[k];
  const float root = __builtin_sqrtf(sum / static_cast<float>(columns) + epsilon);
  const float inverse = 1.0f / root;
  const auto inverses = S::Set(inverse);
  k = 0;
  for (; k + S::kLanes <= columns; k += S::kLanes) {
    S::Store(S::Mul(S::Mul(S::Load(x + k), inverses), S::Load(weight + k)), y + k);
  }
  for (; k < columns; ++k) y[k] = x[k] * inverse * weight[k];
}

template <class S>
typename S::Floats SwiGlu(typename S::Floats gate, typename S::Floats up) {
  const auto e = Exp<S>(S::Sub(S::Set(0), gate));
  return S::Mul(S::Div(gate, S::Add(S::Set(1.0f), e)), up);
}

template <class S>
void SwiGluRow(const float* gate, const float* up, int count, float* out) {
  int i = 0;
  for (; i + S::kLanes <= count; i += S::kLanes) {
    S::Store(SwiGlu<S>(S::Load(gate + i), S::Load(up + i)), out + i);
  }
  if (i == count) return;
  float g[S::kLanes] = {}, u[S::kLanes] = {};
  const size_t rest = (count - i) * sizeof(float);
  std::memcpy(g, gate + i, rest);
  std::memcpy(u, up + i, rest);
  S::Store(SwiGlu<S>(S::Load(g), S::Load(u)), g);
  std::memcpy(out + i, g, rest);
}

template <class S>
void Rotate(const float* turns, int columns, int heads, int head_dim, float* x) {
  for (int head = 0; head < heads; ++head, x += head_dim) {
    int i = 0;
    for (; i + S::kLanes <= columns; i += S::kLanes) {
      S::Store(S::Turn(S::Load(x + i), S::Load(turns + i)), x + i);
    }
    if (i == columns) continue;
    float pairs[S::kLanes] = {}, rest[S::kLanes] = {};
    std::memcpy(pairs, x + i, (columns - i) * sizeof(float));
    std::memcpy(rest, turns + i, (columns - i) * sizeof(float));
    S::Store(S::Turn(S::Load(pairs), S::Load(rest)), pairs);
    std::memcpy(x + i, pairs, (columns - i) * sizeof(float));
  }
}

template <class S>
void ToHalf(const float* x, int count, uint16_t* out) {
  int i = 0;
  for (; i + S::kLanes <= count; i += S::kLanes) S::StoreHalf(S::Load(x + i), out + i);
  if (i == count) return;
  float rest[S::kLanes] = {};
  uint16_t halves[S::kLanes];
  std::memcpy(rest, x + i, (count - i) * sizeof(float));
  S::StoreHalf(S::Load(rest), halves);
  std::memcpy(out + i, halves, (count - i) * sizeof(uint16_t));
}

}  // namespace stagecoach::cpu

#endif  // STAGECOACH_KERNELS_CPU_VECTOR_KERNELS_H_
