// exp2_rowsum: exponentials with a known offset a row, in place, and their row sums. One pass over the tile:
// 4 B read and 4 B written an element, so the floor is the memory's bandwidth. One block a row; a thread sums its
// columns in order and the block sums its threads by a fixed tree, so the result does not vary from run to run.
#include "device.cuh"
#include "launch.h"

namespace mmrlhf::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;

__device__ __forceinline__ float block_sum(float value) {
  __shared__ float partial[kWarps];
  value = lane_sum(value);
  if (threadIdx.x % kWarpSize == 0) partial[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  float total = 0.0f;
  if (threadIdx.x == 0) {
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) total += partial[warp];
  }
  return total;
}

__global__ void __launch_bounds__(kThreads)
    exp2_rowsum_kernel(float* __restrict__ tile, const float* __restrict__ offset, float* __restrict__ sums,
                       const int64_t* __restrict__ target_col, float* __restrict__ target_exp, int64_t cols,
                       int64_t stride, bool accumulate) {
  const int64_t row = blockIdx.x;
  float* values = tile + row * stride;
  const float k = offset[row];
  const int64_t target = target_col == nullptr ? -1 : target_col[row];
  float sum = 0.0f;
  const auto one = [&](int64_t column, float z) {
    const float e = exp2_offset(z, k);
    if (column == target) {
      if (target_exp != nullptr) target_exp[row] = e;
    } else {
      sum += e;
    }
    return e;
  };
  int64_t tail = 0;
  if (aligned(values, 16)) {  // 16 B a thread where the row allows it
    const int64_t quads = cols / 4;
    for (int64_t q = threadIdx.x; q < quads; q += kThreads) {
      float4 z = reinterpret_cast<const float4*>(values)[q];
      z.x = one(4 * q, z.x);
      z.y = one(4 * q + 1, z.y);
      z.z = one(4 * q + 2, z.z);
      z.w = one(4 * q + 3, z.w);
      reinterpret_cast<float4*>(values)[q] = z;
    }
    tail = 4 * quads;
  }
  for (int64_t c = tail + threadIdx.x; c < cols; c += kThreads) values[c] = one(c, values[c]);
  const float total = block_sum(sum);
  if (threadIdx.x == 0) sums[row] = accumulate ? sums[row] + total : total;
}

}  // namespace

cudaError_t exp2_rowsum(float* tile, const float* offset, float* sums, const int64_t* target_col, float* target_exp,
                        int64_t rows, int64_t cols, int64_t stride, bool accumulate, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  if (rows > kMostBlocks) return cudaErrorInvalidValue;
  return start(exp2_rowsum_kernel, dim3(static_cast<unsigned>(rows)), kThreads, stream, tile, offset, sums, target_col,
               target_exp, cols, stride, accumulate);
}

}  // namespace mmrlhf::cuda
