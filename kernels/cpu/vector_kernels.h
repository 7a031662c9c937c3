// Quantising, norm, activation function and half conversion. S: PortableSimd or Avx2Simd.
#ifndef STAGECOACH_KERNELS_CPU_VECTOR_KERNELS_H_
#define STAGECOACH_KERNELS_CPU_VECTOR_KERNELS_H_

#include <cstdint>
#include <cstring>

#include "kernels/cpu/cpu_kernels.h"

namespace stagecoach::cpu {

template <class S>
void Quantize(const float* x, int columns, int8_t* quants, ActivationScale* scales) {
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
    typename S::Ints q[4];
    for (int i = 0; i < 4; ++i) q[i] = S::Round(S::Mul(S::Load(x + 8 * i), inverse));
    S::StoreAsBytes(q[0], q[1], q[2], q[3], quants);
    const int32_t low = S::Sum(S::Add(q[0], q[1]));
    const int32_t high = S::Sum(S::Add(q[2], q[3]));
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
    for (int i = 0; i < kActivationBlock; i += 8) {
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
  auto a = S::Set(0), b = S::Set(0);
  int k = 0;
  for (; k + 16 <= columns; k += 16) {
    const auto u = S::Load(x + k), v = S::Load(x + k + 8);
    a = S::Add(a, S::Mul(u, u));
    b = S::Add(b, S::Mul(v, v));
  }
  float sum = S::Sum(S::Add(a, b));
  for (; k < columns; ++k) sum += x[k] * x[k];
  const float root = __builtin_sqrtf(sum / static_cast<float>(columns) + epsilon);
  const float inverse = 1.0f / root;
  const auto inverses = S::Set(inverse);
  k = 0;
  for (; k + 8 <= columns; k += 8) {
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
  for (; i + 8 <= count; i += 8) {
    S::Store(SwiGlu<S>(S::Load(gate + i), S::Load(up + i)), out + i);
  }
  if (i == count) return;
  float g[8] = {}, u[8] = {};
  const size_t rest = (count - i) * sizeof(float);
  std::memcpy(g, gate + i, rest);
  std::memcpy(u, up + i, rest);
  S::Store(SwiGlu<S>(S::Load(g), S::Load(u)), g);
  std::memcpy(out + i, g, rest);
}

template <class S>
void ToHalf(const float* x, int count, uint16_t* out) {
  int i = 0;
  for (; i + 8 <= count; i += 8) S::StoreHalf(S::Load(x + i), out + i);
  if (i == count) return;
  float rest[8] = {};
  uint16_t halves[8];
  std::memcpy(rest, x + i, (count - i) * sizeof(float));
  S::StoreHalf(S::Load(rest), halves);
  std::memcpy(out + i, halves, (count - i) * sizeof(uint16_t));
}

}  // namespace stagecoach::cpu

#endif  // STAGECOACH_KERNELS_CPU_VECTOR_KERNELS_H_
