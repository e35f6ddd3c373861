// token_statistics over the library's GEMMs: (GEMM -> token_statistics) a block of columns, then finish_statistics. One
// read of each logit and nothing written back: 4 B a logit is the floor.
// A tile's sums are counted from its own largest logit, which is left out of them: no offset has to be known, no row is
// done again, and a sure row keeps the digits of its entropy. Tiles are folded in float64, in one order.
#include "device.cuh"

namespace mmrlhf::cuda {
namespace {

constexpr int kThreads = kRows * kWarpSize;
constexpr int kOwn = kTileColumns / kWarpSize;  // logits of a row and tile a lane has, in registers
constexpr float kLowest = static_cast<float>(kNoToken);

// A lane's own columns: fours beside each other, 128 apart.
__device__ __forceinline__ int column_of(int lane, int i) { return 4 * (i / 4 * kWarpSize + lane) + i % 4; }

template <bool kSoftcap>
__global__ void __launch_bounds__(kThreads) token_statistics_kernel(const TokenStatistics a) {
  const int64_t row = warp_row(), first = static_cast<int64_t>(blockIdx.y) * kTileColumns;
  if (row >= a.rows) return;  // the whole warp
  const int lane = threadIdx.x % kWarpSize;
  const int64_t left = a.columns - first;
  const int count = left < kTileColumns ? static_cast<int>(left) : kTileColumns;
  const float* in = a.tile + row * a.stride + first;
  const float* bias = a.bias == nullptr ? nullptr : a.bias + first;
  float z[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; i += 4) {
    const int column = column_of(lane, i);
    if (a.vectors && column + 4 <= count) {
      const auto some = *reinterpret_cast<const Vector<float>*>(in + column);
#pragma unroll
      for (int j = 0; j < 4; ++j) z[i + j] = some.at[j];
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) z[i + j] = column + j < count ? in[column + j] : 0.0f;
    }
  }
  const int64_t away = a.target[row] - a.start - first;
  float largest = kLowest, total = 0.0f;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int column = column_of(lane, i);
    if (column >= count) continue;
    z[i] = logit<kSoftcap>(z[i], a.logit_scale, bias == nullptr ? 0.0f : read_only(bias + column), a.softcap).value;
    total += z[i];
    largest = fmaxf(largest, z[i]);
    if (column == away) a.z_y[row] = z[i];
  }
  largest = lane_max(largest);
  int at = kTileColumns;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int column = column_of(lane, i);
    if (column < count && z[i] == largest && column < at) at = column;
  }
  at = lane_min(at);  // one of them, were there several
  float sum = 0.0f, moment = 0.0f, squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int column = column_of(lane, i);
    if (column >= count || column == at) continue;
    const float below = z[i] - largest, e = exp2_offset(below, 0.0f);
    sum += e;
    moment += e > 0.0f ? e * below : 0.0f;  // a masked token has E = 0, and is infinitely far below
    squares = fmaf(e, e, squares);
  }
  const float found[kStatistics] = {largest, lane_sum(sum), lane_sum(moment), lane_sum(squares), lane_sum(total)};
  if (lane != 0) return;
#pragma unroll
  for (int i = 0; i < kStatistics; ++i) {
    a.partial[i * a.statistic_stride + blockIdx.y * a.partial_stride + row] = found[i];
  }
}

__global__ void __launch_bounds__(kWarpSize* kSlices) finish_statistics_kernel(const FinishStatistics a) {
  __shared__ Spread spreads[kSlices][kWarpSize];
  __shared__ double totals[kSlices][kWarpSize];
  const int lane = threadIdx.x % kWarpSize, slice = threadIdx.x / kWarpSize;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarpSize + lane;
  Spread spread{kNoToken, 0.0, 0.0, 0.0};
  double total = 0.0;
  if (row < a.rows) {
    for (int64_t tile = slice; tile < a.tiles; tile += kSlices) {
      const float* at = a.partial + tile * a.partial_stride + row;
      const int64_t step = a.statistic_stride;
      spread = folded(spread, {at[0], at[step], at[2 * step], at[3 * step]});
      total += at[4 * step];
    }
  }
  spreads[slice][lane] = spread;
  totals[slice][lane] = total;
  __syncthreads();
  if (slice != 0 || row >= a.rows) return;
  for (int other = 1; other < kSlices; ++other) {
    spread = folded(spread, spreads[other][lane]);
    total += totals[other][lane];
  }
  const bool lost = !(spread.largest > kNoToken) || spread.largest > -kNoToken;  // no token, or one has infinity
  const double whole = 1.0 + spread.rest, own = a.z_y[row];
  const double entropy = log1p(spread.rest) - spread.moment / whole, spread_p2 = (1.0 + spread.squares) / (whole * whole);
  a.entropy[row] = lost ? NAN : static_cast<float>(entropy);
  a.sum_p2[row] = lost ? NAN : static_cast<float>(spread_p2);
  a.mean_logit[row] = static_cast<float>(total / static_cast<double>(a.vocab));
  a.logp[row] = lost ? NAN : static_cast<float>(own - spread.largest - log1p(spread.rest));
  a.is_top1[row] = own >= spread.largest;
}

}  // namespace

cudaError_t token_statistics(TokenStatistics a, cudaStream_t stream) {
  if (a.rows == 0 || a.columns == 0) return cudaSuccess;
  const int64_t blocks = blocks_for(a.rows, kRows), tiles = exp2_epilogue_tiles(a.columns);
  if (blocks > kMostBlocks || tiles > kMostBlocksBeside) return cudaErrorInvalidValue;
  a.vectors = aligned(a.tile, 16) && a.stride % 4 == 0;
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(tiles));
  return a.softcap > 0.0f ? start(token_statistics_kernel<true>, grid, kThreads, stream, a)
                          : start(token_statistics_kernel<false>, grid, kThreads, stream, a);
}

cudaError_t finish_statistics(const FinishStatistics& a, cudaStream_t stream) {
  if (a.rows == 0) return cudaSuccess;
  const int64_t blocks = blocks_for(a.rows, kWarpSize);
  if (blocks > kMostBlocks) return cudaErrorInvalidValue;
  return start(finish_statistics_kernel, dim3(static_cast<unsigned>(blocks)), kWarpSize * kSlices, stream, a);
}

}  // namespace mmrlhf::cuda
