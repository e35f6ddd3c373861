// Launchers of the CUDA kernels: raw device pointers, sizes, a stream. They check nothing but what the launch itself
// needs, set no device and never synchronise; csrc/ checks the arguments and sets the device.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace mmrlhf::cuda {

// tile[r, c] <- 2^(tile[r, c] * log2(e) - offset[r]), and the sum of each row, as mmrlhf::cpu::exp2_rowsum.
cudaError_t exp2_rowsum(float* tile,                // [rows, cols], row stride `stride` elements, columns contiguous
                        const float* offset,        // [rows] integers
                        float* sums,                // [rows]
                        const int64_t* target_col,  // [rows] or null: the column left out of the sum, if 0 <= it < cols
                        float* target_exp,          // [rows] or null: receives the exponential at that column
                        int64_t rows, int64_t cols, int64_t stride, bool accumulate, cudaStream_t stream);

}  // namespace mmrlhf::cuda
