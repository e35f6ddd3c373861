// Formulas that host and device share, so that the CPU tests exercise the arithmetic of the CUDA kernels.
// Plain C++17: no framework, no CUDA header needed on the host.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define MMRLHF_HD __host__ __device__ __forceinline__
#else
#define MMRLHF_HD inline
#endif

namespace mmrlhf {

// A load of what nobody writes meanwhile: on the device through the read-only cache, so that loads need not wait for
// stores before them.
template <typename T>
MMRLHF_HD T read_only(const T* at) {
#if defined(__CUDA_ARCH__)
  return __ldg(at);
#else
  return *at;
#endif
}

MMRLHF_HD int64_t blocks_for(int64_t count, int64_t each) { return (count + each - 1) / each; }

MMRLHF_HD bool aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// log2(e) in two float32 pieces. Their sum is off by 4.3e-16.
constexpr float kLog2eHigh = 1.44269502f;
constexpr float kLog2eLow = 1.92596303e-08f;

// 2^f = 1 + f (c1 + f (c2 + ...)), |f| <= 0.52: largest relative error 4.0e-9. Derivation: csrc/cpu/fit_exp2.py.
constexpr float kExp2C1 = 0.693147182f;
constexpr float kExp2C2 = 0.240226462f;
constexpr float kExp2C3 = 0.0555035211f;
constexpr float kExp2C4 = 0.0096186325f;
constexpr float kExp2C5 = 0.00133952312f;
constexpr float kExp2C6 = 0.000153065237f;

constexpr float kExp2Reach = 0.52f;    // half a unit, and z times kLog2eLow, which t leaves out, for |z| < 1e6
constexpr float kExp2Limit = 160.0f;   // 2^160 overflows float32 and 2^-160 underflows, whatever the mantissa
constexpr float kRoundMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds |t| < 2^22 to an integer, ties to even

MMRLHF_HD uint32_t bits_of(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

MMRLHF_HD float float_of(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

// Comparisons that are false for NaN leave it as it came; fminf and fmaxf would drop it.
MMRLHF_HD float clamp_keep_nan(float value, float limit) {
  value = value > limit ? limit : value;
  return value < -limit ? -limit : value;
}

// 2^(z * log2(e) - k) for an integer k held in a float. At most 1.1 ulp off (measured) for |z| < 1e6; beyond, where
// neighbouring float32 logits lie 6 % apart in probability and more, f is held in its range and the result is finite
// and within that spacing. The exponent n is split off before the residual is formed: k + n is exact, so f loses
// nothing as z grows. (exp2(fma(z, log2e, -k)) rounds t first, and is 62 ulp off at |t| = 126.)
// NaN stays NaN; +inf gives inf; -inf gives 0; denormal results are rounded once.
MMRLHF_HD float exp2_offset(float z, float k) {
  const float t = clamp_keep_nan(fmaf(z, kLog2eHigh, -k), kExp2Limit);
  const float shifted = t + kRoundMagic;
  const float n = shifted - kRoundMagic;
  const float f = clamp_keep_nan(fmaf(z, kLog2eLow, fmaf(z, kLog2eHigh, -(k + n))), kExp2Reach);
  float p = fmaf(kExp2C6, f, kExp2C5);
  p = fmaf(p, f, kExp2C4);
  p = fmaf(p, f, kExp2C3);
  p = fmaf(p, f, kExp2C2);
  p = fmaf(p, f, kExp2C1);
  p = fmaf(p, f, 1.0f);
  // 2^n in two factors, each a normal float for |n| <= 160. For NaN the bits are arbitrary and p is NaN anyway.
  const uint32_t exponent = bits_of(shifted) - bits_of(kRoundMagic);
  const uint32_t half = static_cast<uint32_t>(static_cast<int32_t>(exponent) >> 1);
  return p * float_of((half + 127u) << 23) * float_of((exponent - half + 127u) << 23);
}

// tanh(x) for |x| below kTanhSeries: Cephes' odd polynomial (tanhf).
constexpr float kTanhSeries = 0.625f;

MMRLHF_HD float tanh_series(float x) {
  const float square = x * x;
  float series = fmaf(-5.70498872745e-3f, square, 2.06390887954e-2f);
  series = fmaf(series, square, -5.37397155531e-2f);
  series = fmaf(series, square, 1.33314422036e-1f);
  series = fmaf(series, square, -3.33332819422e-1f);
  return fmaf(x * square, series, x);
}

// tanh(x) with 1 - tanh(x)^2, each within a few ulp: where tanh is near 1 the slope is not taken as a difference. Below
// kTanhSeries its polynomial; above, with u = exp(-2|x|), 1 - 2u / (1 + u) and 4u / (1 + u)^2.
struct Tanh {
  float value, slope;
};

MMRLHF_HD Tanh tanh_and_slope(float x) {
  const float size = fabsf(x);
  if (size < kTanhSeries) {
    const float value = tanh_series(x);
    return {value, fmaf(-value, value, 1.0f)};
  }
  const float u = exp2_offset(-2.0f * size, 0.0f), inverse = 1.0f / (1.0f + u);  // NaN comes here, and stays
  const float value = fmaf(-2.0f * u, inverse, 1.0f);
  return {x < 0.0f ? -value : value, 4.0f * u * inverse * inverse};
}

// One logit: z = scale * raw + bias (nats), capped, and the slope of the cap there.
template <bool kSoftcap>
MMRLHF_HD Tanh logit(float raw, float scale, float bias, float softcap) {
  const float z = fmaf(scale, raw, bias);
  if (!kSoftcap) return {z, 1.0f};
  const Tanh capped = tanh_and_slope(z / softcap);
  return {softcap * capped.value, capped.slope};
}

// E = 2^(z log2(e) - k) of a logit, and E times the slope of the cap, which is what the gradient needs.
struct Exponential {
  float e, kept;
};

template <bool kSoftcap>
MMRLHF_HD Exponential exponential(float raw, float scale, float bias, float softcap, float k) {
  const Tanh z = logit<kSoftcap>(raw, scale, bias, softcap);
  const float e = exp2_offset(z.value, k);
  return {e, kSoftcap ? e * z.slope : e};
}

// S' above this: the row is made again with its true maximum as the offset. So a row that was has its offset 33 or more
// above its first one, rint(z_y log2(e)), and 32.5 or more above z_y log2(e): fewer than 2^31 tokens share what is above
// 2^64.
constexpr float kRedoAbove = 18446744073709551616.0f;  // 2^64
constexpr double kRedone = 32.0;
constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;

// dlogp/dh = logit_scale (S' slope_y W_y - E W) / S: the target's share is S' / S = 1 - p_y, exact as p_y -> 1.
struct UnitFactors {
  float share, scale;  // share W_y - scale (E W)
};

MMRLHF_HD UnitFactors unit_factors(float logit_scale, float rest, float z_y, float k, float slope_y) {
  const float scale = logit_scale / (rest + exp2_offset(z_y, k));
  return {rest * scale * slope_y, scale};
}

// What the sum S' over all other tokens says of a row: log-probability of its target, -log1p(S' / E_y). In double:
// one number a row. Where k is the row's maximum, E_y may be tiny; there the difference of logarithms is exact enough.
MMRLHF_HD double logp_of(double rest, double z_y, double k) {
  const double own = z_y * kLog2e - k, e_y = exp2(own);
  return own < -64.0 ? own * kLn2 - log(rest + e_y) : -log1p(rest / e_y);
}

// The softmax of some tokens without its scale: their largest logit, and sums over the others of E = exp(z - largest),
// E (z - largest) and E^2; each sum is of terms of one sign, so that a sure row's entropy of 1e-9 nats keeps its digits.
struct Spread {
  double largest, rest, moment, squares;
};
constexpr double kNoToken = -3.4028234663852886e38;  // float32's lowest, as the largest of no token or of masked ones

// Of two sets of tokens, their union's.
MMRLHF_HD Spread folded(const Spread& one, const Spread& two) {
  const bool first = one.largest >= two.largest;
  const Spread &high = first ? one : two, &low = first ? two : one;
  const double far = low.largest - high.largest, distance = far < -1e4 ? -1e4 : far, scale = exp(distance);
  return {high.largest, high.rest + scale * (1.0 + low.rest),
          high.moment + scale * (low.moment + distance * (1.0 + low.rest)),
          high.squares + scale * scale * (1.0 + low.squares)};
}

}  // namespace mmrlhf
