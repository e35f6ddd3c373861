// What the kernels share: launching, sums over a warp, and bfloat16 as 16 bits. Nothing but CUDA's own built-ins, so that
// a test can compile the kernels as host C++ with threads of its own (tests/csrc/emulate.h).
#pragma once

#include <cuda_runtime_api.h>

#include "formulas.cuh"
#include "launch.h"

namespace mmrlhf::cuda {

#if !defined(MMRLHF_EMULATE)
template <typename... Parameters, typename... Arguments>
cudaError_t start(void (*kernel)(Parameters...), dim3 grid, unsigned threads, cudaStream_t stream,
                  Arguments... arguments) {
  kernel<<<grid, threads, 0, stream>>>(arguments...);
  return cudaGetLastError();
}
#endif

constexpr int kWarpSize = 32;
constexpr int64_t kMostBlocks = 2147483647;  // the grid's first dimension; the others end at 65535
constexpr int64_t kMostBlocksBeside = 65535;

constexpr int kRows = 8;    // rows a block where a warp has one
constexpr int kSlices = 8;  // threads a row where the tiles of rows are gathered: each has every eighth tile

// The row of this warp, of kRows a block.
__device__ __forceinline__ int64_t warp_row() {
  return static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / kWarpSize;
}

// The values of a warp's lanes to one, the same in every lane if fold(x, y) is fold(y, x). All 32 lanes must come.
template <typename T, typename Fold>
__device__ __forceinline__ T over_lanes(T value, const Fold& fold) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value = fold(value, __shfl_xor_sync(0xffffffffu, value, distance));
  }
  return value;
}

template <typename T>
__device__ __forceinline__ T lane_sum(T value) {
  return over_lanes(value, [](T x, T y) { return x + y; });
}

// Largest over the lanes; a NaN is passed over.
__device__ __forceinline__ float lane_max(float value) {
  return over_lanes(value, [](float x, float y) { return fmaxf(x, y); });
}

__device__ __forceinline__ int lane_min(int value) {
  return over_lanes(value, [](int x, int y) { return y < x ? y : x; });
}

struct Bfloat16 {
  uint16_t bits;
};

inline int64_t size_of(bool half) { return half ? sizeof(Bfloat16) : sizeof(float); }

// Numbers that one load or store moves: 16 bytes of them, or so many.
template <typename T, int kCount = 16 / sizeof(T)>
struct alignas(kCount * sizeof(T)) Vector {
  static constexpr int kSize = kCount;
  T at[kCount];
};

MMRLHF_HD float to_float(float value) { return value; }
MMRLHF_HD float to_float(Bfloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }

// Two bfloat16, `low` in the lower half, rounded to nearest, ties to even.
MMRLHF_HD uint32_t bfloat16_pair(float low, float high) {
#if defined(__CUDA_ARCH__)
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
#else
  const auto rounded = [](float value) {
    const uint32_t bits = bits_of(value);
    if (value != value) return (bits >> 16) | 0x40u;  // a NaN stays one
    return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  };
  return rounded(low) | (rounded(high) << 16);
#endif
}

__device__ __forceinline__ void store(float* out, float value) { *out = value; }
__device__ __forceinline__ void store(Bfloat16* out, float value) {
  out->bits = static_cast<uint16_t>(bfloat16_pair(value, 0.0f));
}

struct Nothing {};  // nothing is stored: the sums alone
__device__ __forceinline__ void store(Nothing*, float) {}

// How many of the chosen rows this launch has, which the device alone knows; 0 or less where they end before `first`.
__device__ __forceinline__ int64_t number_of(const Chosen& chosen) {
  const int64_t left = *chosen.count - chosen.first;
  return left < chosen.capacity ? left : chosen.capacity;
}

// unit_factors of a row, from the vectors of UnitGradient or RedoUnit.
template <typename Arguments>
__device__ __forceinline__ UnitFactors factors_of_row(const Arguments& a, int64_t row) {
  return unit_factors(a.logit_scale, a.rest[row], a.z_y[row], a.offset[row],
                      a.slope_y == nullptr ? 1.0f : a.slope_y[row]);
}

}  // namespace mmrlhf::cuda
