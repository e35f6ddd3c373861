#include "exp2_rowsum.h"

#include <limits>

#include "../../kernels/cuda/formulas.cuh"
#include "parallel.h"

namespace mmrlhf::cpu {

double exp2_row_scalar(float* values, int64_t cols, float k) {
  double total = 0.0;
  for (int64_t start = 0; start < cols; start += kBlock) {
    const int64_t end = start + kBlock < cols ? start + kBlock : cols;
    float lanes[16] = {};  // sixteen partial sums, as the vector paths have: a compiler may put them in registers
    int64_t c = start;
    for (; c + 16 <= end; c += 16) {
      for (int i = 0; i < 16; ++i) {
        values[c + i] = exp2_offset(values[c + i], k);
        lanes[i] += values[c + i];
      }
    }
    for (; c < end; ++c) {
      values[c] = exp2_offset(values[c], k);
      lanes[c % 16] += values[c];
    }
    for (float lane : lanes) total += lane;
  }
  return total;
}

bool supported(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (isa == Isa::avx512) return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq");
  if (isa == Isa::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return isa == Isa::scalar;
}

Isa best_isa() {
  static const Isa best = supported(Isa::avx512) ? Isa::avx512 : supported(Isa::avx2) ? Isa::avx2 : Isa::scalar;
  return best;
}

namespace {

using RowOf = double (*)(float*, int64_t, float);

RowOf row_of(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::avx2) return &exp2_row_avx2;
  if (isa == Isa::avx512) return &exp2_row_avx512;
#endif
  return &exp2_row_scalar;
}

// Calls body(row, its values) for every row, on at most `threads` threads.
template <typename Body>
void for_rows(const Tile& tile, int threads, const Body& body) {
  // A thread is worth waking for about 16 us of work: 32k elements at 0.5 ns each.
  constexpr int64_t kWorthAThread = 1 << 15;
  const int64_t useful = 1 + tile.rows * tile.cols / kWorthAThread;
  parallel_rows(tile.rows, useful < threads ? static_cast<int>(useful) : threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) body(row, tile.values + row * tile.stride);
  });
}

}  // namespace

void exp2_rowsum(const Tile& tile, const float* offset, float* sums, const int64_t* target_col, float* target_exp,
                 bool accumulate, Isa isa, int threads) {
  const RowOf pass = row_of(isa);
  for_rows(tile, threads, [&](int64_t row, float* values) {
    const int64_t target = target_col == nullptr ? -1 : target_col[row];
    double sum;
    if (target >= 0 && target < tile.cols) {
      const float e = exp2_offset(values[target], offset[row]);
      sum = pass(values, target, offset[row]) + pass(values + target + 1, tile.cols - target - 1, offset[row]);
      values[target] = e;
      if (target_exp != nullptr) target_exp[row] = e;
    } else {
      sum = pass(values, tile.cols, offset[row]);
    }
    sums[row] = static_cast<float>(accumulate ? sums[row] + sum : sum);
  });
}

void exp2_rowsum_block(const Tile& tile, const float* offset, float* rest, const int64_t* target, int64_t start,
                       const float* target_value, Isa isa, int threads) {
  const RowOf pass = row_of(isa);
  for_rows(tile, threads, [&](int64_t row, float* values) {
    const int64_t column = target[row] - start;
    const bool here = target[row] >= start && column < tile.cols;
    if (here) values[column] = -std::numeric_limits<float>::infinity();  // whose exponential is 0
    rest[row] = static_cast<float>(rest[row] + pass(values, tile.cols, offset[row]));
    if (here && target_value != nullptr) values[column] = target_value[row];
  });
}

}  // namespace mmrlhf::cpu
