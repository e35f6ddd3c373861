// The arithmetic of exp2_gemm's epilogue, for host and device: t = acc * gain + b log2(e) - k, E = 2^t.
//
// How exact it has to be: an error d of t is a relative error d ln(2) of E, and logp moves by the average of those over
// the vocabulary, weighted with p. gain = logit_scale log2(e) is held in two float32 pieces (with one, t would be off by
// up to 6e-8 of z log2(e) itself, however small t is); then t is rounded twice, to 2^-24 of |t| each, and ex2.approx is
// within 2^-22. For |t| < 30 that is at most 30 * 2^-23 * 0.69 + 2^-22 < 2.8e-6, and what has |t| near 30 weighs 1e-9
// of the sum or is the sum; measured, the error of logp is below 1e-6 (tests/kernels/test_exp2_gemm.py). Splitting off
// the exponent first, as exp2_offset does, costs five instructions more an element; E is stored in 8 bits of mantissa.
#pragma once

#include "formulas.cuh"

namespace mmrlhf {

struct Gain {
  float high = 0.0f, low = 0.0f;
};

// Both pieces have one sign, so `high` is rounded towards 0: with two signs an infinite acc would give inf - inf, NaN,
// where 0 or inf is right.
inline Gain split_gain(double logit_scale) {
  const double gain = logit_scale * kLog2e;
  float high = static_cast<float>(gain);
  if (fabs(static_cast<double>(high)) > fabs(gain)) high = nextafterf(high, 0.0f);
  return {high, static_cast<float>(gain - high)};
}

MMRLHF_HD float exponent(float acc, Gain gain, float k) { return fmaf(acc, gain.low, fmaf(acc, gain.high, -k)); }

MMRLHF_HD float add_bias(float t, float bias) { return fmaf(bias, kLog2eHigh, t); }

// Results below 2^-126 become 0: they weigh nothing beside E_y, which is near 1 or, in a row made again at its maximum,
// beside the largest.
MMRLHF_HD float power_of_two(float t) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(t));
  return result;
#else
  return exp2f(t);
#endif
}

// With a cap: z = softcap tanh(x), x = (logit_scale acc + b) / softcap. Held as what an element needs.
struct Cap {
  float gain = 0.0f, bias_gain = 0.0f;  // x = acc gain + b bias_gain
  float reach = 0.0f;                   // softcap log2(e): t = reach tanh(x) - k
};

inline Cap cap_of(double logit_scale, double softcap) {
  return {static_cast<float>(logit_scale / softcap), static_cast<float>(1.0 / softcap),
          static_cast<float>(softcap * kLog2e)};
}

MMRLHF_HD float reciprocal(float value) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
#else
  return 1.0f / value;
#endif
}

// tanh_and_slope of formulas.cuh with ex2.approx and rcp.approx: 3 instructions of the special function unit an element
// in all, and no branch, for half of a warp's elements are small. A NaN stays one.
MMRLHF_HD Tanh tanh_and_slope_approx(float x) {
  const float size = fabsf(x), near = tanh_series(x);
  const float u = power_of_two(-2.0f * kLog2eHigh * size), inverse = reciprocal(1.0f + u);
  const float far = copysignf(fmaf(-2.0f * u, inverse, 1.0f), x);
  const bool small = size < kTanhSeries;
  return {small ? near : far, small ? fmaf(-near, near, 1.0f) : 4.0f * u * inverse * inverse};
}

}  // namespace mmrlhf
