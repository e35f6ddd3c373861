// Some rows of linear_logp again, which rows being known on the device alone.
//
//   select -> redo_maximum (offset <- the true one) -> redo_exponentials -> finish -> redo_unit
//
// A row with S' above 2^64 (its target's log-probability below -44 nats), or not a number, is done again with its true
// maximum as the offset. Asking the host which rows these are would make it wait, and end the capture of a graph. So
// everything here is launched whatever they are, and a block walks over as many tiles as their number gives: none, as a
// rule, and then it ends at once.
// Plain FMAs on tiles of 16 gathered rows, no tensor cores: with a few bad rows the weight is read at about the memory's
// speed; with all rows bad the result is right, and slow. The same rows give the same E bitwise, so a gradient of the
// weight can make E again, a block of columns at a time. No atomics: a tile's maximum and sums have places of their own.
#include "device.cuh"

namespace mmrlhf::cuda {
namespace {

constexpr int kSelectThreads = 1024;
constexpr int kSelectWarps = kSelectThreads / kWarpSize;

// One block, so that indices come out in order.
__global__ void __launch_bounds__(kSelectThreads) select_kernel(const Select a) {
  __shared__ int32_t found_by[kSelectWarps];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  int32_t found = 0;
  for (int64_t start = 0; start < a.rows; start += kSelectThreads) {
    const int64_t row = start + threadIdx.x;
    bool bad = false;
    if (row < a.rows) {
      bad = a.done ? a.offset[row] - a.z_y[row] * kLog2e > kRedone : !(a.rest[row] <= kRedoAbove);  // so a NaN is bad
    }
    const unsigned flags = __ballot_sync(0xffffffffu, bad);
    if (lane == 0) found_by[warp] = __popc(flags);
    __syncthreads();
    int32_t place = found + __popc(flags & ((1u << lane) - 1u));
    for (int other = 0; other < kSelectWarps; ++other) {
      place += other < warp ? found_by[other] : 0;
      found += found_by[other];
    }
    if (bad) a.index[place] = static_cast<int32_t>(row);
    __syncthreads();  // before the next rows' counts are written
  }
  if (threadIdx.x == 0) *a.count = found;
}

// A tile of 16 rows and 128 columns: a thread has 4 rows and 4 columns beside each other, a warp all columns of its
// rows, so that what a row needs of its columns is within a warp.
constexpr int kTileRows = 16;
constexpr int kDepth = 32;
constexpr int kEach = 4;
constexpr int kThreads = kRedoColumns;
constexpr int kMostPrograms = 1056;  // 8 blocks on each of 132 multiprocessors
static_assert(kRedoColumns == kEach * kWarpSize && kTileRows == kEach * kThreads / kWarpSize, "a thread's share");
static_assert(kTileRows * kDepth == kEach * kThreads, "a thread loads 4 numbers of the rows");
static_assert(kEach == Vector<float>::kSize, "and 4 of a slab at once");

struct alignas(16) Slab {  // kDepth steps of the sum; rows padded to spread over the banks
  float rows[kDepth][kTileRows + kEach];
  float columns[kDepth][kRedoColumns];
};

// The next kDepth numbers of a thread's row of the left matrix: 4 of them. `row` is null past the last row.
template <typename T>
__device__ __forceinline__ void load_rows(Slab& slab, const T* row, int64_t start, int64_t depth) {
  const int place = threadIdx.x / (kDepth / kEach), first = threadIdx.x % (kDepth / kEach) * kEach;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int64_t k = start + first + i;
    slab.rows[first + i][place] = row != nullptr && k < depth ? to_float(row[k]) : 0.0f;
  }
}

// And of a thread's column of the right one. kDeep: a column lies side by side in memory, `from` is its start; else it
// is `stride` apart.
template <bool kDeep, typename T>
__device__ __forceinline__ void load_columns(Slab& slab, const T* from, int64_t stride, int64_t start, int64_t depth,
                                             bool vectors) {
  constexpr int kSize = Vector<T>::kSize;
  const int column = threadIdx.x;
  if (kDeep && vectors && from != nullptr && start + kDepth <= depth) {
#pragma unroll
    for (int k = 0; k < kDepth; k += kSize) {
      const auto some = *reinterpret_cast<const Vector<T>*>(from + start + k);
#pragma unroll
      for (int i = 0; i < kSize; ++i) slab.columns[k + i][column] = to_float(some.at[i]);
    }
    return;
  }
#pragma unroll 8
  for (int k = 0; k < kDepth; ++k) {
    const bool inside = from != nullptr && start + k < depth;
    slab.columns[k][column] = inside ? to_float(from[(start + k) * (kDeep ? 1 : stride)]) : 0.0f;
  }
}

// sum += left right over `depth`, each slab summed apart first: the error grows with depth / 32 and not with depth.
template <bool kDeep, typename Left, typename Right>
__device__ __forceinline__ void accumulate(Slab& slab, float (&sum)[kEach][kEach], const Left* row, const Right* column,
                                           int64_t stride, int64_t depth, bool vectors) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  for (int64_t start = 0; start < depth; start += kDepth) {
    load_rows(slab, row, start, depth);
    load_columns<kDeep>(slab, column, stride, start, depth, vectors);
    __syncthreads();
    float part[kEach][kEach] = {};
#pragma unroll 8
    for (int k = 0; k < kDepth; ++k) {
      const auto left = *reinterpret_cast<const Vector<float>*>(&slab.rows[k][kEach * warp]);
      const auto right = *reinterpret_cast<const Vector<float>*>(&slab.columns[k][kEach * lane]);
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
#pragma unroll
        for (int j = 0; j < kEach; ++j) part[i][j] = fmaf(left.at[i], right.at[j], part[i][j]);
      }
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
#pragma unroll
      for (int j = 0; j < kEach; ++j) sum[i][j] += part[i][j];
    }
    __syncthreads();  // before the next slab is written
  }
}

// The row whose numbers this thread loads, of the tile that starts at place `first`; -1 past the last.
__device__ __forceinline__ int64_t loaded_place(int64_t first, int64_t some) {
  const int64_t place = first + threadIdx.x / (kDepth / kEach);
  return place < some ? place : -1;
}

template <bool kSoftcap>
__device__ __forceinline__ float largest_logit(const Redo& a, const float (&raw)[kEach], int64_t first) {
  float best = -INFINITY;
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    if (first + j >= a.columns) continue;
    const float bias = a.bias == nullptr ? 0.0f : a.bias[first + j];
    best = fmaxf(best, logit<kSoftcap>(raw[j], a.logit_scale, bias, a.softcap).value);
  }
  return best;
}

template <typename T, bool kSoftcap>
__device__ __forceinline__ float exponentials_of(const Redo& a, const float (&raw)[kEach], int64_t first, int64_t row,
                                                 int64_t place) {
  const float k = a.offset[row];
  const int64_t left_out = a.target[row] - a.start;
  T* out = a.out == nullptr ? nullptr : static_cast<T*>(a.out) + (a.by_row ? row : place) * a.out_stride;
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const int64_t column = first + j;
    if (column >= a.columns) continue;
    const float bias = a.bias == nullptr ? 0.0f : a.bias[column];
    const Exponential one = exponential<kSoftcap>(raw[j], a.logit_scale, bias, a.softcap, k);
    sum += column == left_out ? 0.0f : one.e;
    if (out != nullptr) store(out + column, column == left_out ? 0.0f : one.kept);
  }
  return sum;
}

// kMaximum: the largest logit of each tile to `partial`; else E, and its sums.
template <typename T, bool kSoftcap, bool kMaximum>
__global__ void __launch_bounds__(kThreads) redo_kernel(const Redo a) {
  __shared__ Slab slab;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int64_t some = number_of(a.chosen);
  if (some <= 0) return;  // every block
  const int32_t* index = a.chosen.index + a.chosen.first;
  const int64_t row_tiles = blocks_for(some, kTileRows), tiles = row_tiles * blocks_for(a.columns, kRedoColumns);
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {  // the rows of a column tile one after another
    const int64_t first_place = tile % row_tiles * kTileRows, column_tile = tile / row_tiles;
    const int64_t loaded = loaded_place(first_place, some), column = column_tile * kRedoColumns + threadIdx.x;
    const int64_t from = loaded < 0 ? 0 : index[loaded];
    const bool inside = column < a.columns;
    float raw[kEach][kEach] = {};
    accumulate<true>(slab, raw, loaded < 0 ? nullptr : static_cast<const T*>(a.hidden) + from * a.hidden_stride,
                     inside ? static_cast<const T*>(a.weight) + column * a.weight_stride : nullptr, 0, a.width,
                     a.vectors);
    if (a.low != nullptr) {
      accumulate<true>(slab, raw, loaded < 0 ? nullptr : a.low + from * a.low_stride,
                       inside ? a.up + column * a.up_stride : nullptr, 0, a.rank, false);
    }
    const int64_t first = column_tile * kRedoColumns + kEach * lane;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int64_t place = first_place + kEach * warp + i;
      if (place >= some) continue;  // the whole warp
      float found;
      if (kMaximum) {
        found = lane_max(largest_logit<kSoftcap>(a, raw[i], first));
      } else {
        found = lane_sum(exponentials_of<T, kSoftcap>(a, raw[i], first, index[place], place));
      }
      if (lane == 0 && a.partial != nullptr) a.partial[column_tile * a.partial_stride + place] = found;
    }
  }
}

__global__ void __launch_bounds__(kWarpSize* kSlices) redo_offset_kernel(const Redo a) {
  __shared__ float best_of[kSlices][kWarpSize];
  const int lane = threadIdx.x % kWarpSize, slice = threadIdx.x / kWarpSize;
  const int64_t some = number_of(a.chosen), first = static_cast<int64_t>(blockIdx.x) * kWarpSize;
  if (first >= some) return;  // the whole block
  const int64_t place = first + lane, tiles = blocks_for(a.columns, kRedoColumns);
  float best = -INFINITY;
  if (place < some) {
    for (int64_t tile = slice; tile < tiles; tile += kSlices) {
      best = fmaxf(best, a.partial[tile * a.partial_stride + place]);
    }
  }
  best_of[slice][lane] = best;
  __syncthreads();
  if (slice != 0 || place >= some) return;
  for (int other = 1; other < kSlices; ++other) best = fmaxf(best, best_of[other][lane]);
  const int64_t row = a.chosen.index[a.chosen.first + place];
  const float rounded = rintf(best * kLog2eHigh);
  if (rounded > a.offset[row]) a.offset[row] = rounded;  // an offset that is NaN stays one
}

template <typename E, typename W>
__global__ void __launch_bounds__(kThreads) redo_unit_kernel(const RedoUnit a) {
  __shared__ Slab slab;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int64_t some = number_of(a.chosen);
  if (some <= 0) return;  // every block
  const int32_t* index = a.chosen.index + a.chosen.first;
  const W* weight = static_cast<const W*>(a.weight);
  const int64_t row_tiles = blocks_for(some, kTileRows), tiles = row_tiles * blocks_for(a.width, kRedoColumns);
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t first_place = tile % row_tiles * kTileRows, first = tile / row_tiles * kRedoColumns;
    const int64_t loaded = loaded_place(first_place, some);
    const int64_t from = loaded < 0 ? 0 : a.by_row ? index[loaded] : loaded;
    float product[kEach][kEach] = {};
    accumulate<false>(slab, product, loaded < 0 ? nullptr : static_cast<const E*>(a.exponentials) + from * a.e_stride,
                      first + threadIdx.x < a.width ? weight + first + threadIdx.x : nullptr, a.weight_stride, a.vocab,
                      false);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int64_t place = first_place + kEach * warp + i;
      if (place >= some) continue;
      const int64_t row = index[place], y = a.target[row];
      const bool known = y >= 0 && y < a.vocab;
      const auto [share, scale] = factors_of_row(a, row);
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const int64_t inner = first + kEach * lane + j;
        if (inner >= a.width) continue;
        const float own = known ? to_float(weight[y * a.weight_stride + inner]) : 0.0f;
        a.unit[row * a.unit_stride + inner] = fmaf(share, own, -scale * product[i][j]);
      }
    }
  }
}

unsigned programs(int64_t rows, int64_t columns) {
  const int64_t tiles = blocks_for(rows, kTileRows) * blocks_for(columns, kRedoColumns);
  return static_cast<unsigned>(tiles < kMostPrograms ? tiles : kMostPrograms);
}

template <bool kMaximum>
cudaError_t redo(Redo& a, cudaStream_t stream) {
  a.vectors = aligned(a.weight, 16) && a.weight_stride * size_of(a.half) % 16 == 0;
  const dim3 grid(programs(a.chosen.capacity, a.columns));
  const bool capped = a.softcap > 0.0f;
  if (a.half) {
    return capped ? start(redo_kernel<Bfloat16, true, kMaximum>, grid, kThreads, stream, a)
                  : start(redo_kernel<Bfloat16, false, kMaximum>, grid, kThreads, stream, a);
  }
  return capped ? start(redo_kernel<float, true, kMaximum>, grid, kThreads, stream, a)
                : start(redo_kernel<float, false, kMaximum>, grid, kThreads, stream, a);
}

}  // namespace

cudaError_t select(const Select& a, cudaStream_t stream) {
  if (a.rows > kMostBlocks) return cudaErrorInvalidValue;  // an index has 32 bits
  return start(select_kernel, dim3(1), kSelectThreads, stream, a);
}

int64_t redo_tiles(int64_t columns) { return blocks_for(columns, kRedoColumns); }

cudaError_t redo_maximum(Redo a, cudaStream_t stream) {
  if (a.chosen.capacity == 0 || a.columns == 0) return cudaSuccess;
  const cudaError_t status = redo<true>(a, stream);
  if (status != cudaSuccess) return status;
  const dim3 grid(static_cast<unsigned>(blocks_for(a.chosen.capacity, kWarpSize)));
  return start(redo_offset_kernel, grid, kWarpSize * kSlices, stream, a);
}

cudaError_t redo_exponentials(Redo a, cudaStream_t stream) {
  return a.chosen.capacity == 0 || a.columns == 0 ? cudaSuccess : redo<false>(a, stream);
}

cudaError_t redo_unit(const RedoUnit& a, cudaStream_t stream) {
  if (a.chosen.capacity == 0 || a.width == 0) return cudaSuccess;
  const dim3 grid(programs(a.chosen.capacity, a.width));
  if (a.half_e != a.half_weight) {
    if (!a.half_e) return cudaErrorInvalidValue;
    return start(redo_unit_kernel<Bfloat16, float>, grid, kThreads, stream, a);
  }
  return a.half_e ? start(redo_unit_kernel<Bfloat16, Bfloat16>, grid, kThreads, stream, a)
                  : start(redo_unit_kernel<float, float>, grid, kThreads, stream, a);
}

}  // namespace mmrlhf::cuda
