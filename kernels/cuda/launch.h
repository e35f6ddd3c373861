// Launchers of the CUDA kernels: raw device pointers, sizes, a stream. They check nothing but what the launch itself
// needs, set no device and never synchronise; csrc/ checks the arguments and sets the device.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace mmrlhf {
struct PreferenceArguments;  // preference_formulas.cuh
}

namespace mmrlhf::cuda {

// tile[r, c] <- 2^(tile[r, c] * log2(e) - offset[r]), and the sum of each row, as mmrlhf::cpu::exp2_rowsum.
cudaError_t exp2_rowsum(float* tile,                // [rows, cols], row stride `stride` elements, columns contiguous
                        const float* offset,        // [rows] integers
                        float* sums,                // [rows]
                        const int64_t* target_col,  // [rows] or null: the column left out of the sum, if 0 <= it < cols
                        float* target_exp,          // [rows] or null: receives the exponential at that column
                        int64_t rows, int64_t cols, int64_t stride, bool accumulate, cudaStream_t stream);

// The head: z = logit_scale * <h, W_v> + bias_v, with a cap softcap * tanh(z / softcap). Matrices have their columns side
// by side; `half` says bfloat16 and not float32. `vectors` is the launcher's to fill: whether addresses allow 16 B loads.

// The target's logit, the slope of the cap there, and the row's offset k = rint(z_y log2(e)). A target outside
// [0, vocab) is not read: its row becomes NaN.
struct TargetLogit {
  const void* hidden;     // [rows, width]
  const void* weight;     // [vocab, width]
  const float* bias;      // [vocab] or null
  const int64_t* target;  // [rows]
  float* z_y;             // [rows] out
  float* slope_y;         // [rows] out, or null: no cap
  float* offset;          // [rows] out
  int64_t rows, vocab, width, hidden_stride, weight_stride;
  float logit_scale, softcap;
  bool half, vectors;
};
cudaError_t target_logit(TargetLogit arguments, cudaStream_t stream);

constexpr int kTileColumns = 1024;  // columns a partial sum covers
int64_t exp2_epilogue_tiles(int64_t columns);

// E = 2^(z log2(e) - k) of a block of columns, times the slope of the cap, 0 at the targets; and the sums of E a tile.
struct Exp2Epilogue {
  const float* tile;      // [rows, columns] <h, W_v> for v = start ...
  void* out;              // [rows, columns] out, may be the tile; or null: sums alone
  const float* bias;      // [columns] or null
  const float* offset;    // [rows]
  const int64_t* target;  // [rows], of the whole vocabulary
  float* partial;         // [tiles, rows] out, row stride partial_stride
  int64_t rows, columns, start, stride, out_stride, partial_stride;
  float logit_scale, softcap;  // softcap 0: none
  bool half, vectors;          // half: of `out`
};
cudaError_t exp2_epilogue(Exp2Epilogue arguments, cudaStream_t stream);

// Partial sums to S' and to log-probabilities.
struct Finish {
  const float* partial;  // [tiles, rows], row stride `stride`
  const float* z_y;      // [rows]
  const float* offset;   // [rows]
  float* rest;           // [rows] out: S'
  float* logp;           // [rows] out, nats
  int64_t rows, tiles, stride;
};
cudaError_t finish(const Finish& arguments, cudaStream_t stream);

// product <- dlogp/dh from E W, whose target column was 0.
struct UnitGradient {
  float* product;         // [rows, width], in place
  const void* weight;     // [vocab, width]
  const int64_t* target;  // [rows]
  const float* z_y;       // [rows]
  const float* offset;    // [rows]
  const float* rest;      // [rows]
  const float* slope_y;   // [rows] or null
  int64_t rows, vocab, width, stride, weight_stride;
  float logit_scale;
  bool half, vectors;
};
cudaError_t unit_gradient(UnitGradient arguments, cudaStream_t stream);

// Token log-probabilities to the loss and its derivative for every token. `scratch` is [3 R + 2 P]; indices are not
// checked.
cudaError_t preference(const PreferenceArguments& arguments, cudaStream_t stream);
int preference_team_warps(int64_t responses);  // warps that share a response

}  // namespace mmrlhf::cuda
