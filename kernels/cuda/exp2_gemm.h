// exp2_gemm for Hopper (sm_90a): E[n, v] = 2^(z log2(e) - k_n) with z = logit_scale <h_n, W_v> + b_v, or with a cap
// softcap tanh(z / softcap). E is stored in bfloat16, times the slope of the cap, or not at all; its partial sums,
// without the slope, always are. The GEMM is CUTLASS's, whose headers only the kernels' build needs: this header needs
// neither them nor CUDA's, and exp2_gemm_built() says whether the kernels are in.
//
//   refuse() -> plan_exp2_gemm() -> the caller allocates `partial` -> exp2_gemm()
//
// Nothing here allocates device memory or waits. Not covered: statistics, float16, float32.
#pragma once

#include <cstddef>
#include <cstdint>

typedef struct CUstream_st* cudaStream_t;  // word for word as in CUDA's headers

namespace mmrlhf::cuda {

// A tile of E that one block of threads makes. Its two groups of 4 warps either share a tile ("cooperative") or take
// turns, one multiplying while the other makes exponentials ("pingpong").
struct GemmTile {
  const char* name;
  int rows, columns;
  double slowness;  // time an element takes against the first tile's, for choosing: see pick_gemm_tile
};

// How a problem is cut. Two blocks, one above the other, share the loads of a weight tile.
struct GemmPlan {
  int tile;            // index of kGemmTiles
  int64_t tiles;       // partial sums a row: ceil(vocab / columns)
  int64_t padded_rows; // leading dimension of `partial`: rows up to a whole tile, all of which are written
  int64_t row_step;    // rows that two blocks take: fewer leave part of them idle
  int swizzle;         // column tiles a group of blocks walks over before it goes on to the next rows
};

struct Exp2Gemm {
  const void* hidden;      // [rows, width] bfloat16, row stride hidden_stride
  const void* weight;      // [vocab, width] bfloat16, row stride weight_stride
  void* out;               // [rows, vocab] bfloat16, row stride out_stride; or null: the sums alone. 0 at the targets
  const int64_t* target;   // [rows]; one outside [0, vocab) meets no column; read as 32 bits
  const float* offset;     // [rows]: k
  const float* bias;       // [vocab] or null
  float* partial;          // [tiles, padded_rows]: sums of E over a tile's columns, the target's left out; below 2^31 entries
  int64_t hidden_stride, weight_stride, out_stride;  // elements
  int64_t rows, vocab, width;
  double logit_scale, softcap;  // softcap 0: none
  int tile;                // index of kGemmTiles
  int device, multiprocessors;
  cudaStream_t stream;
};

enum class GemmStatus : int { ok, not_built, refused, not_initialised, not_launched };

constexpr int kGemmTileCount = 2;
extern const GemmTile kGemmTiles[kGemmTileCount];

// "CUTLASS 4.2.0", or "" where the build had no headers of it.
const char* exp2_gemm_built();

// The index of a name; -1 if there is none of that name.
int gemm_tile_named(const char* name);

// The tile to take, from sizes alone: pure.
int pick_gemm_tile(int64_t rows, int64_t vocab, int multiprocessors);

// How the problem is cut with a tile. Bytes of `partial`: 4 * tiles * padded_rows.
GemmPlan plan_exp2_gemm(int64_t rows, int64_t vocab, int tile);

// Why these arguments cannot be taken, null if they can. Looks at no memory; does not ask whether it was built.
const char* refuse(const Exp2Gemm& arguments);

// What CUTLASS makes of it on the host alone, for checks without a GPU.
struct GemmFacts {
  int shared_bytes, stages, threads;
  size_t workspace_bytes;
  bool taken;
};
GemmStatus exp2_gemm_facts(const Exp2Gemm& arguments, GemmFacts& facts);

// One launch. rows = 0 does nothing.
GemmStatus exp2_gemm(const Exp2Gemm& arguments);

const char* message_of(GemmStatus status);

}  // namespace mmrlhf::cuda
