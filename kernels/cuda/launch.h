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

// The head: z = logit_scale * <h, W_v> + bias_v, with a cap softcap * tanh(z / softcap). Logits are in nats. Matrices
// have their columns side by side; strides are elements from one row to the next; `half` says bfloat16 and not float32.
// `vectors` is the launcher's to fill: whether addresses allow loads and stores of several numbers at once.

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

// Rows to do again, which the device alone knows: `select` writes their indices in ascending order, and how many they
// are. A launch takes those at the places [first, first + capacity) that exist.
struct Chosen {
  const int32_t* index;  // [rows]
  const int32_t* count;  // [1]
  int64_t first, capacity;
};

// Partial sums to S' and to log-probabilities.
struct Finish {
  const float* partial;  // [tiles, rows], row stride `stride`
  const float* z_y;      // [rows]
  const float* offset;   // [rows]
  float* rest;           // [rows] out: S'
  float* logp;           // [rows] out, nats
  int64_t rows, tiles, stride;
  Chosen chosen;  // index null: every row; else these, `partial` having a place for each
};
cudaError_t finish(const Finish& arguments, cudaStream_t stream);

// product <- dlogp/dh, from E W with E 0 in the target's column. For an adapter: dlogp/du from E B, `weight` being B.
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

// The rows with S' above 2^64, or not a number; `done`: those that were, seen by their offset alone.
struct Select {
  const float* rest;    // [rows]
  const float* z_y;     // [rows]
  const float* offset;  // [rows]
  int32_t* index;       // [rows] out: the first *count entries
  int32_t* count;       // [1] out
  int64_t rows;
  bool done;
};
cudaError_t select(const Select& arguments, cudaStream_t stream);

constexpr int kRedoColumns = 128;  // columns a partial sum or maximum of a chosen row covers
int64_t redo_tiles(int64_t columns);

// Logits of the chosen rows, and of an adapter's part of them: logit_scale (<h, W_v> + <low, up_v>) + bias_v, capped.
struct Redo {
  const void* hidden;  // [rows, width]
  const void* weight;  // [columns, width]: the vocabulary, or a block of it from `start` on
  const float* bias;   // [columns] or null
  const float* low;    // [rows, rank] or null
  const float* up;     // [columns, rank]
  const int64_t* target;  // [rows], of the whole vocabulary
  float* offset;          // [rows]
  void* out;              // [capacity, columns], or with by_row [rows, columns]: E; or null
  float* partial;         // [tiles, capacity]
  int64_t columns, width, rank, start;
  int64_t hidden_stride, weight_stride, low_stride, up_stride, out_stride, partial_stride;
  Chosen chosen;
  float logit_scale, softcap;
  bool half, by_row, vectors;
};
// offset <- the larger of it and rint(z log2(e)) of the largest logit. `partial` is scratch.
cudaError_t redo_maximum(Redo arguments, cudaStream_t stream);
// E of the block, 0 at the targets, and its sums to `partial`; either may be null.
cudaError_t redo_exponentials(Redo arguments, cudaStream_t stream);

// dlogp/dh of the chosen rows, from their exponentials with 0 in the target's column. For an adapter: dlogp/du,
// `weight` being its B, which is float32 whatever the exponentials are.
struct RedoUnit {
  const void* exponentials;  // [capacity, vocab], or with by_row [rows, vocab]
  const void* weight;        // [vocab, width]
  float* unit;               // [rows, width] out
  const int64_t* target;     // [rows]
  const float* z_y;          // [rows]
  const float* offset;       // [rows]
  const float* rest;         // [rows]
  const float* slope_y;      // [rows] or null
  int64_t vocab, width, e_stride, weight_stride, unit_stride;
  Chosen chosen;
  float logit_scale;
  bool half_e, half_weight, by_row;
};
cudaError_t redo_unit(const RedoUnit& arguments, cudaStream_t stream);

// Token statistics of a block of columns, kTileColumns at a time: partial[:, tile, row] are the largest logit, then
// over the other tokens the sums of E = exp(z - largest), E (z - largest) and E^2, and the sum of all z. z_y[row] is
// written where the block has the target, else left as it is.
constexpr int kStatistics = 5;
struct TokenStatistics {
  const float* tile;      // [rows, columns] <h, W_v> for v = start ...
  const float* bias;      // [columns] or null
  const int64_t* target;  // [rows], of the whole vocabulary
  float* z_y;             // [rows] out
  float* partial;         // [kStatistics, tiles, rows]
  int64_t rows, columns, start, stride, statistic_stride, partial_stride;
  float logit_scale, softcap;
  bool vectors;
};
cudaError_t token_statistics(TokenStatistics arguments, cudaStream_t stream);

// The tiles of a row to its statistics; NaN where no token has a probability.
struct FinishStatistics {
  const float* partial;  // [kStatistics, tiles, rows]
  const float* z_y;      // [rows]
  float* logp;           // [rows] out, nats
  float* entropy;        // [rows] out, nats
  float* sum_p2;         // [rows] out
  float* mean_logit;     // [rows] out, nats
  int8_t* is_top1;       // [rows] out: 1 where no token has a larger logit than z_y
  int64_t rows, tiles, vocab, statistic_stride, partial_stride;
};
cudaError_t finish_statistics(const FinishStatistics& arguments, cudaStream_t stream);

// Token log-probabilities to the loss and its derivative for every token. `scratch` is [3 R + 2 P]; indices are not
// checked.
cudaError_t preference(const PreferenceArguments& arguments, cudaStream_t stream);
int preference_team_warps(int64_t responses);  // warps that share a response

}  // namespace mmrlhf::cuda
