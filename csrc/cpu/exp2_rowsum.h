// exp2_rowsum on the host: exponentials with a known offset a row, in place, and their row sums.
#pragma once

#include <cstdint>

namespace mmrlhf::cpu {

enum class Isa { scalar, avx2, avx512 };

struct Tile {
  float* values;  // [rows, cols], columns contiguous
  int64_t rows;
  int64_t cols;
  int64_t stride;  // elements from one row to the next
};

// One row: values <- 2^(values * log2(e) - k), returning their sum, accumulated in float32 over at most kBlock columns
// and in float64 beyond, so that its relative error does not grow with the vocabulary.
constexpr int64_t kBlock = 2048;
double exp2_row_scalar(float* values, int64_t cols, float k);
double exp2_row_avx2(float* values, int64_t cols, float k);
double exp2_row_avx512(float* values, int64_t cols, float k);

bool supported(Isa isa);
Isa best_isa();

// As the launcher in kernels/cuda/launch.h. The sum leaves the target's column out without subtracting it, so that
// logp = -log1p(sum / target_exp) keeps its relative precision as the target's probability goes to 1.
void exp2_rowsum(const Tile& tile, const float* offset, float* sums, const int64_t* target_col, float* target_exp,
                 bool accumulate, Isa isa, int threads);

// One block of a head's logits, whose first column is token `start`: the target's column, where the block has it, is
// left out of the sum and becomes target_value[row], or 0 if that is null; the sum is added to rest[row].
void exp2_rowsum_block(const Tile& tile, const float* offset, float* rest, const int64_t* target, int64_t start,
                       const float* target_value, Isa isa, int threads);

}  // namespace mmrlhf::cpu
