// linear_logp around the library's GEMMs: target_logit -> (GEMM -> exp2_epilogue) a block of columns -> finish, and
// unit_gradient. Each reads and writes every number once, 16 B a thread where addresses allow, one number where not, so
// its floor is the memory's bandwidth: 8 B a logit for the epilogue with float32 exponentials, 6 B with bfloat16, 4 B
// for the sums alone, at some 20 instructions a logit, a third of what the multiprocessors could do in that time.
// No atomics and no order left to chance: a row's sum is a lane's own columns in order, then a butterfly over the warp;
// `finish` adds the tiles in float64, eight slices of them in order and then the slices.
// Offsets are 64-bit; V, H and the strides are free. A row that is not finite spoils no other: nothing is shared by rows.
#include "device.cuh"
#include "launch.h"

namespace mmrlhf::cuda {
namespace {

constexpr int kThreads = kRows * kWarpSize;
constexpr int kLoads = kTileColumns / (4 * kWarpSize);  // loads of 4 floats a lane, in flight together
static_assert(kLoads * 4 * kWarpSize == kTileColumns, "a tile is whole loads of every lane");

template <typename T>
__global__ void __launch_bounds__(kThreads) target_logit_kernel(const TargetLogit a) {
  const int64_t row = warp_row();
  if (row >= a.rows) return;  // the whole warp
  const int lane = threadIdx.x % kWarpSize;
  const int64_t y = a.target[row];
  const bool known = y >= 0 && y < a.vocab;
  const T* hidden = static_cast<const T*>(a.hidden) + row * a.hidden_stride;
  const T* weight = static_cast<const T*>(a.weight) + (known ? y : 0) * a.weight_stride;
  constexpr int kSize = Vector<T>::kSize;
  // In double: every other logit is measured from this one, and a float32 sum whose products are rounded one by one is
  // several times further off than the GEMM's. A product of two floats is exact here, and a row costs only `width`.
  double sums[kSize] = {};
  int64_t first = 0;
  if (a.vectors && known) {
    first = a.width / kSize * kSize;
#pragma unroll 2
    for (int64_t i = lane * kSize; i < first; i += kWarpSize * kSize) {
      const auto h = *reinterpret_cast<const Vector<T>*>(hidden + i), w = *reinterpret_cast<const Vector<T>*>(weight + i);
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        sums[j] = fma(static_cast<double>(to_float(h.at[j])), static_cast<double>(to_float(w.at[j])), sums[j]);
      }
    }
  }
  if (known) {
    for (int64_t i = first + lane; i < a.width; i += kWarpSize) {
      sums[0] = fma(static_cast<double>(to_float(hidden[i])), static_cast<double>(to_float(weight[i])), sums[0]);
    }
  }
  double total = 0.0;
#pragma unroll
  for (int j = 0; j < kSize; ++j) total += sums[j];
  const float dot = static_cast<float>(lane_sum(total));
  if (lane != 0) return;
  float z = fmaf(a.logit_scale, dot, a.bias != nullptr && known ? a.bias[y] : 0.0f);
  Tanh capped{0.0f, 1.0f};
  if (a.slope_y != nullptr) {
    capped = tanh_and_slope(z / a.softcap);
    z = a.softcap * capped.value;
    a.slope_y[row] = known ? capped.slope : NAN;
  }
  z = known ? z : NAN;  // a target that is no token is not read
  a.z_y[row] = z;
  a.offset[row] = rintf(z * kLog2eHigh);
}

// One lane's four logits to exponentials; `left_out` is the target's place among them, if it is there.
template <bool kSoftcap>
__device__ __forceinline__ Vector<float> four(const Exp2Epilogue& a, Vector<float> raw, const float* bias, int left_out,
                                              float k, Vector<float>& sums) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const Exponential one =
        exponential<kSoftcap>(raw.at[j], a.logit_scale, bias == nullptr ? 0.0f : read_only(bias + j), a.softcap, k);
    sums.at[j] += left_out == j ? 0.0f : one.e;
    raw.at[j] = left_out == j ? 0.0f : one.kept;
  }
  return raw;
}

template <bool kSoftcap>
__device__ __forceinline__ float one_kept(const Exp2Epilogue& a, float raw, const float* bias, bool left_out, float k,
                                          float& sum) {
  const Exponential one =
      exponential<kSoftcap>(raw, a.logit_scale, bias == nullptr ? 0.0f : read_only(bias), a.softcap, k);
  sum += left_out ? 0.0f : one.e;
  return left_out ? 0.0f : one.kept;
}

__device__ __forceinline__ void store4(float* out, const Vector<float>& v) { *reinterpret_cast<Vector<float>*>(out) = v; }
__device__ __forceinline__ void store4(Bfloat16* out, const Vector<float>& v) {
  *reinterpret_cast<Vector<uint32_t, 2>*>(out) = {bfloat16_pair(v.at[0], v.at[1]), bfloat16_pair(v.at[2], v.at[3])};
}
__device__ __forceinline__ void store4(Nothing*, const Vector<float>&) {}

// A warp a row and kTileColumns columns. `out` may be the tile itself: a lane stores where it has loaded.
template <bool kSoftcap, typename Out>
__global__ void __launch_bounds__(kThreads) exp2_epilogue_kernel(const Exp2Epilogue a) {
  const int64_t row = warp_row(), first = static_cast<int64_t>(blockIdx.y) * kTileColumns;
  if (row >= a.rows) return;  // the whole warp
  const int lane = threadIdx.x % kWarpSize;
  const int64_t count = a.columns - first < kTileColumns ? a.columns - first : kTileColumns;
  const float* in = a.tile + row * a.stride + first;
  Out* out = a.out == nullptr ? nullptr : static_cast<Out*>(a.out) + row * a.out_stride + first;
  const float* bias = a.bias == nullptr ? nullptr : a.bias + first;
  const float k = a.offset[row];
  const int64_t away = a.target[row] - a.start - first;
  const int y = away >= 0 && away < count ? static_cast<int>(away) : -1;
  Vector<float> sums{};
  if (a.vectors && count == kTileColumns) {
    Vector<float> raw[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) raw[i] = reinterpret_cast<const Vector<float>*>(in)[i * kWarpSize + lane];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int c = 4 * (i * kWarpSize + lane);
      raw[i] = four<kSoftcap>(a, raw[i], bias == nullptr ? nullptr : bias + c, y - c, k, sums);
      store4(out + c, raw[i]);
    }
  } else {
    for (int64_t c = lane; c < count; c += kWarpSize) {
      store(out + c, one_kept<kSoftcap>(a, in[c], bias == nullptr ? nullptr : bias + c, c == y, k, sums.at[0]));
    }
  }
  const float sum = lane_sum((sums.at[0] + sums.at[1]) + (sums.at[2] + sums.at[3]));
  if (lane == 0) a.partial[blockIdx.y * a.partial_stride + row] = sum;
}

__global__ void __launch_bounds__(kWarpSize* kSlices) finish_kernel(const Finish a) {
  __shared__ double added[kSlices][kWarpSize];
  const int lane = threadIdx.x % kWarpSize, slice = threadIdx.x / kWarpSize;
  const bool some = a.chosen.index != nullptr;
  const int64_t rows = some ? number_of(a.chosen) : a.rows, slot = static_cast<int64_t>(blockIdx.x) * kWarpSize + lane;
  if (static_cast<int64_t>(blockIdx.x) * kWarpSize >= rows) return;  // the whole block
  double sum = 0.0;
  if (slot < rows) {
#pragma unroll 4
    for (int64_t tile = slice; tile < a.tiles; tile += kSlices) sum += a.partial[tile * a.stride + slot];
  }
  added[slice][lane] = sum;
  __syncthreads();
  if (slice != 0 || slot >= rows) return;
  for (int other = 1; other < kSlices; ++other) sum += added[other][lane];
  const int64_t row = some ? a.chosen.index[a.chosen.first + slot] : slot;
  a.rest[row] = static_cast<float>(sum);
  a.logp[row] = static_cast<float>(logp_of(sum, a.z_y[row], a.offset[row]));
}

constexpr int kGradientColumns = 4 * kThreads;  // of a row, a block

template <typename T>
__global__ void __launch_bounds__(kThreads) unit_gradient_kernel(const UnitGradient a) {
  const int64_t row = blockIdx.x, first = static_cast<int64_t>(blockIdx.y) * kGradientColumns + 4 * threadIdx.x;
  if (first >= a.width) return;
  const int64_t y = a.target[row];
  const bool known = y >= 0 && y < a.vocab;
  const auto [share, scale] = factors_of_row(a, row);
  float* product = a.product + row * a.stride + first;
  const T* weight = static_cast<const T*>(a.weight) + (known ? y : 0) * a.weight_stride + first;
  if (a.vectors && known && first + 4 <= a.width) {
    Vector<float> values = *reinterpret_cast<const Vector<float>*>(product);
    const auto w = *reinterpret_cast<const Vector<T, 4>*>(weight);
#pragma unroll
    for (int j = 0; j < 4; ++j) values.at[j] = fmaf(share, to_float(w.at[j]), -scale * values.at[j]);
    *reinterpret_cast<Vector<float>*>(product) = values;
    return;
  }
  for (int j = 0; j < 4 && first + j < a.width; ++j) {
    product[j] = fmaf(share, known ? to_float(weight[j]) : 0.0f, -scale * product[j]);
  }
}

}  // namespace

cudaError_t target_logit(TargetLogit a, cudaStream_t stream) {
  if (a.rows == 0) return cudaSuccess;
  const int64_t blocks = blocks_for(a.rows, kRows), size = size_of(a.half);
  if (blocks > kMostBlocks) return cudaErrorInvalidValue;
  a.vectors = aligned(a.hidden, 16) && aligned(a.weight, 16) && a.hidden_stride * size % 16 == 0 &&
              a.weight_stride * size % 16 == 0;
  const dim3 grid(static_cast<unsigned>(blocks));
  return a.half ? start(target_logit_kernel<Bfloat16>, grid, kThreads, stream, a)
                : start(target_logit_kernel<float>, grid, kThreads, stream, a);
}

int64_t exp2_epilogue_tiles(int64_t columns) { return blocks_for(columns, kTileColumns); }

cudaError_t exp2_epilogue(Exp2Epilogue a, cudaStream_t stream) {
  if (a.rows == 0 || a.columns == 0) return cudaSuccess;
  const int64_t blocks = blocks_for(a.rows, kRows), tiles = exp2_epilogue_tiles(a.columns);
  if (blocks > kMostBlocks || tiles > kMostBlocksBeside) return cudaErrorInvalidValue;
  const int64_t out_step = 4 * size_of(a.half);  // bytes a lane stores at once
  a.vectors = aligned(a.tile, 16) && a.stride % 4 == 0 &&
              (a.out == nullptr || (aligned(a.out, out_step) && a.out_stride % 4 == 0));
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(tiles));
  const bool capped = a.softcap > 0.0f;
  if (a.out == nullptr) {
    return capped ? start(exp2_epilogue_kernel<true, Nothing>, grid, kThreads, stream, a)
                  : start(exp2_epilogue_kernel<false, Nothing>, grid, kThreads, stream, a);
  }
  if (a.half) {
    return capped ? start(exp2_epilogue_kernel<true, Bfloat16>, grid, kThreads, stream, a)
                  : start(exp2_epilogue_kernel<false, Bfloat16>, grid, kThreads, stream, a);
  }
  return capped ? start(exp2_epilogue_kernel<true, float>, grid, kThreads, stream, a)
                : start(exp2_epilogue_kernel<false, float>, grid, kThreads, stream, a);
}

cudaError_t finish(const Finish& a, cudaStream_t stream) {
  const int64_t rows = a.chosen.index == nullptr ? a.rows : a.chosen.capacity;
  if (rows == 0) return cudaSuccess;
  const int64_t blocks = blocks_for(rows, kWarpSize);
  if (blocks > kMostBlocks) return cudaErrorInvalidValue;
  return start(finish_kernel, dim3(static_cast<unsigned>(blocks)), kWarpSize * kSlices, stream, a);
}

cudaError_t unit_gradient(UnitGradient a, cudaStream_t stream) {
  if (a.rows == 0 || a.width == 0) return cudaSuccess;
  const int64_t beside = blocks_for(a.width, kGradientColumns), size = size_of(a.half);
  if (a.rows > kMostBlocks || beside > kMostBlocksBeside) return cudaErrorInvalidValue;
  a.vectors = aligned(a.product, 16) && a.stride % 4 == 0 && aligned(a.weight, 4 * size) && a.weight_stride % 4 == 0;
  const dim3 grid(static_cast<unsigned>(a.rows), static_cast<unsigned>(beside));
  return a.half ? start(unit_gradient_kernel<Bfloat16>, grid, kThreads, stream, a)
                : start(unit_gradient_kernel<float>, grid, kThreads, stream, a);
}

}  // namespace mmrlhf::cuda
