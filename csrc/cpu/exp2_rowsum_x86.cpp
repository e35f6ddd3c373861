// The AVX2 and AVX-512 forms of exp2_offset (kernels/cuda/formulas.cuh), compiled in whatever the build machine is and
// chosen at run time. min and max return their second operand where either is NaN: that order keeps NaN.
#if defined(__x86_64__)

#include <immintrin.h>

#include "../../kernels/cuda/formulas.cuh"
#include "exp2_rowsum.h"

#define MMRLHF_AVX2 __attribute__((target("avx2,fma")))
#define MMRLHF_AVX512 __attribute__((target("avx512f,avx512dq")))

namespace mmrlhf::cpu {
namespace {

MMRLHF_AVX2 inline __m256 clamp256(__m256 value, float limit) {
  return _mm256_max_ps(_mm256_set1_ps(-limit), _mm256_min_ps(_mm256_set1_ps(limit), value));
}

MMRLHF_AVX2 inline __m256 exp2_offset256(__m256 z, __m256 k) {
  const __m256 high = _mm256_set1_ps(kLog2eHigh), magic = _mm256_set1_ps(kRoundMagic);
  const __m256 t = clamp256(_mm256_fmsub_ps(z, high, k), kExp2Limit);
  const __m256 shifted = _mm256_add_ps(t, magic);
  const __m256 n = _mm256_sub_ps(shifted, magic);
  const __m256 inner = _mm256_fmsub_ps(z, high, _mm256_add_ps(k, n));
  const __m256 f = clamp256(_mm256_fmadd_ps(z, _mm256_set1_ps(kLog2eLow), inner), kExp2Reach);
  __m256 p = _mm256_fmadd_ps(_mm256_set1_ps(kExp2C6), f, _mm256_set1_ps(kExp2C5));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(kExp2C4));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(kExp2C3));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(kExp2C2));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(kExp2C1));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(1.0f));
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256i exponent = _mm256_sub_epi32(_mm256_castps_si256(shifted), _mm256_castps_si256(magic));
  const __m256i half = _mm256_srai_epi32(exponent, 1);
  const __m256i rest = _mm256_sub_epi32(exponent, half);
  p = _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23)));
  return _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23)));
}

MMRLHF_AVX2 inline double sum256(__m256 a, __m256 b) {
  alignas(32) float lanes[16];
  _mm256_store_ps(lanes, a);
  _mm256_store_ps(lanes + 8, b);
  double total = 0.0;
  for (float lane : lanes) total += lane;
  return total;
}

MMRLHF_AVX512 inline __m512 clamp512(__m512 value, float limit) {
  return _mm512_max_ps(_mm512_set1_ps(-limit), _mm512_min_ps(_mm512_set1_ps(limit), value));
}

MMRLHF_AVX512 inline __m512 exp2_offset512(__m512 z, __m512 k) {
  const __m512 high = _mm512_set1_ps(kLog2eHigh);
  const __m512 t = clamp512(_mm512_fmsub_ps(z, high, k), kExp2Limit);
  const __m512 n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 inner = _mm512_fmsub_ps(z, high, _mm512_add_ps(k, n));
  const __m512 f = clamp512(_mm512_fmadd_ps(z, _mm512_set1_ps(kLog2eLow), inner), kExp2Reach);
  __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(kExp2C6), f, _mm512_set1_ps(kExp2C5));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(kExp2C4));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(kExp2C3));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(kExp2C2));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(kExp2C1));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);  // rounds once, denormals included
}

}  // namespace

MMRLHF_AVX2 double exp2_row_avx2(float* values, int64_t cols, float k) {
  const __m256 offset = _mm256_set1_ps(k);
  double total = 0.0;
  for (int64_t start = 0; start < cols; start += kBlock) {
    const int64_t end = start + kBlock < cols ? start + kBlock : cols;
    __m256 sum0 = _mm256_setzero_ps(), sum1 = _mm256_setzero_ps();
    int64_t c = start;
    for (; c + 16 <= end; c += 16) {
      const __m256 e0 = exp2_offset256(_mm256_loadu_ps(values + c), offset);
      const __m256 e1 = exp2_offset256(_mm256_loadu_ps(values + c + 8), offset);
      _mm256_storeu_ps(values + c, e0);
      _mm256_storeu_ps(values + c + 8, e1);
      sum0 = _mm256_add_ps(sum0, e0);
      sum1 = _mm256_add_ps(sum1, e1);
    }
    for (; c < end; c += 8) {
      const int left = static_cast<int>(end - c);
      const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
      const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(left), lane);
      const __m256 e = exp2_offset256(_mm256_maskload_ps(values + c, mask), offset);
      _mm256_maskstore_ps(values + c, mask, e);
      sum0 = _mm256_add_ps(sum0, _mm256_and_ps(e, _mm256_castsi256_ps(mask)));
    }
    total += sum256(sum0, sum1);
  }
  return total;
}

MMRLHF_AVX512 double exp2_row_avx512(float* values, int64_t cols, float k) {
  const __m512 offset = _mm512_set1_ps(k);
  double total = 0.0;
  for (int64_t start = 0; start < cols; start += kBlock) {
    const int64_t end = start + kBlock < cols ? start + kBlock : cols;
    __m512 sum0 = _mm512_setzero_ps(), sum1 = _mm512_setzero_ps();
    int64_t c = start;
    for (; c + 32 <= end; c += 32) {
      const __m512 e0 = exp2_offset512(_mm512_loadu_ps(values + c), offset);
      const __m512 e1 = exp2_offset512(_mm512_loadu_ps(values + c + 16), offset);
      _mm512_storeu_ps(values + c, e0);
      _mm512_storeu_ps(values + c + 16, e1);
      sum0 = _mm512_add_ps(sum0, e0);
      sum1 = _mm512_add_ps(sum1, e1);
    }
    for (; c < end; c += 16) {
      const int64_t left = end - c;
      const __mmask16 mask = left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1u);
      const __m512 e = exp2_offset512(_mm512_maskz_loadu_ps(mask, values + c), offset);
      _mm512_mask_storeu_ps(values + c, mask, e);
      sum0 = _mm512_mask_add_ps(sum0, mask, sum0, e);
    }
    alignas(64) float lanes[32];
    _mm512_store_ps(lanes, sum0);
    _mm512_store_ps(lanes + 16, sum1);
    for (float lane : lanes) total += lane;
  }
  return total;
}

}  // namespace mmrlhf::cpu

#endif
