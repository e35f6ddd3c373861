// The host half of exp2_gemm: which tile, how the problem is cut, what is refused. Plain C++, so that it is tested on
// any machine; the kernels themselves are in exp2_gemm_sm90_*.cu, one file a tile.
#include "exp2_gemm.h"

#include <cstring>

#include "formulas.cuh"

namespace mmrlhf::cuda {

// Slowness is an estimate, not a measurement. In a clock in which the tensor cores are busy, the first tile's operands
// are 32 bytes an SM and the second's 48, which is more than L2 gives every SM at once; but the second makes its
// exponentials behind the other group's multiplication. A benchmark can ask for a tile by name.
const GemmTile kGemmTiles[kGemmTileCount] = {{"128x256", 128, 256, 1.0}, {"64x256", 64, 256, 1.2}};

namespace {

constexpr int kCluster = 2;  // row tiles that share a weight tile
constexpr int64_t kMost = INT32_MAX - 1024;  // CUTLASS counts rows, columns and depth in 32 bits

int64_t up(int64_t value, int64_t step) { return blocks_for(value, step) * step; }

}  // namespace

int gemm_tile_named(const char* name) {
  for (int tile = 0; tile < kGemmTileCount; ++tile) {
    if (std::strcmp(kGemmTiles[tile].name, name) == 0) return tile;
  }
  return -1;
}

// Blocks run in waves, one a multiprocessor, and row tiles come in pairs: the time is the number of waves times a tile's
// elements. The larger tile is the faster one where it fills them; up to 128 rows, or where an odd number of 128-row
// tiles would leave a sixth of the work empty, the smaller one is.
int pick_gemm_tile(int64_t rows, int64_t vocab, int multiprocessors) {
  int best = 0;
  double least = 0;
  for (int tile = 0; tile < kGemmTileCount; ++tile) {
    const GemmTile& shape = kGemmTiles[tile];
    const int64_t blocks = up(rows, shape.rows * kCluster) / shape.rows * blocks_for(vocab, shape.columns);
    const int64_t at_once = multiprocessors / kCluster * kCluster;
    const int64_t waves = blocks_for(blocks, at_once);
    const double time = static_cast<double>(waves) * shape.rows * shape.columns * shape.slowness;
    if (tile == 0 || time < least) best = tile, least = time;
  }
  return best;
}

// Blocks at work at the same time should need few rows and few columns, so that both stay in L2: up to 8 pairs of row
// tiles, all rows are taken for a column tile before the next one. With more, groups of column tiles are walked over
// first. CUTLASS then rounds both counts of tiles up to whole groups and computes what is added, so the largest group
// is taken that adds no more than 1/32.
GemmPlan plan_exp2_gemm(int64_t rows, int64_t vocab, int tile) {
  const GemmTile& shape = kGemmTiles[tile];
  const int64_t row_tiles = up(rows, shape.rows * kCluster) / shape.rows;
  const int64_t column_tiles = blocks_for(vocab, shape.columns);
  int swizzle = 1;
  for (int group = row_tiles > 8 * kCluster ? 8 : 1; group > 1; group /= 2) {
    const int64_t rounded = up(row_tiles, group * kCluster) * up(column_tiles, group);
    if (rounded * 32 <= row_tiles * column_tiles * 33) {
      swizzle = group;
      break;
    }
  }
  return {tile, column_tiles, up(rows, shape.rows), static_cast<int64_t>(shape.rows) * kCluster, swizzle};
}

const char* refuse(const Exp2Gemm& a) {
  if (!(a.softcap >= 0.0)) return "softcap must not be negative";
  if (a.tile < 0 || a.tile >= kGemmTileCount) return "there is no such tile";
  if (a.rows < 0 || a.vocab < 1 || a.width < 1) return "the matrices are empty";
  if (a.rows > kMost || a.vocab > kMost || a.width > kMost) return "a size does not fit 32 bits";
  if (a.width % 8 != 0) return "the width of hidden and weight must be a multiple of 8";
  if (a.hidden_stride % 8 != 0 || a.weight_stride % 8 != 0) {
    return "the row strides of hidden and weight must be multiples of 8";
  }
  if (a.hidden_stride < a.width || a.weight_stride < a.width) return "rows of hidden or weight overlap";
  if (a.out != nullptr && (a.out_stride % 8 != 0 || a.out_stride < a.vocab)) {
    return "the row stride of out must be a multiple of 8, and at least the vocabulary";
  }
  if (!aligned(a.hidden, 16) || !aligned(a.weight, 16) || !aligned(a.out, 16) || !aligned(a.partial, 16)) {
    return "hidden, weight, out and partial must start at a multiple of 16 bytes";
  }
  return nullptr;
}

const char* message_of(GemmStatus status) {
  switch (status) {
    case GemmStatus::ok: return "no error";
    case GemmStatus::not_built: return "this build of mmrlhf was made without CUTLASS's headers";
    case GemmStatus::refused: return "CUTLASS does not take this problem";
    case GemmStatus::not_initialised: return "CUTLASS could not prepare the kernel: is this an sm_90 device?";
    case GemmStatus::not_launched: return "the kernel was not launched";
  }
  return "unknown status";
}

#if defined(MMRLHF_CUTLASS_VERSION)

// A pair a tile without a cap and one with, in the file that instantiates their kernels.
GemmStatus launch_128x256(const Exp2Gemm&, int swizzle);
GemmStatus launch_64x256(const Exp2Gemm&, int swizzle);
GemmStatus launch_128x256_softcap(const Exp2Gemm&, int swizzle);
GemmStatus launch_64x256_softcap(const Exp2Gemm&, int swizzle);
GemmFacts facts_128x256(const Exp2Gemm&, int swizzle);
GemmFacts facts_64x256(const Exp2Gemm&, int swizzle);
GemmFacts facts_128x256_softcap(const Exp2Gemm&, int swizzle);
GemmFacts facts_64x256_softcap(const Exp2Gemm&, int swizzle);

namespace {
constexpr decltype(&launch_128x256) kLaunch[2][kGemmTileCount] = {{launch_128x256, launch_64x256},
                                                                 {launch_128x256_softcap, launch_64x256_softcap}};
constexpr decltype(&facts_128x256) kFacts[2][kGemmTileCount] = {{facts_128x256, facts_64x256},
                                                              {facts_128x256_softcap, facts_64x256_softcap}};
}  // namespace

const char* exp2_gemm_built() { return "CUTLASS " MMRLHF_CUTLASS_VERSION; }

GemmStatus exp2_gemm_facts(const Exp2Gemm& a, GemmFacts& facts) {
  if (refuse(a) != nullptr) return GemmStatus::refused;
  facts = kFacts[a.softcap > 0.0][a.tile](a, plan_exp2_gemm(a.rows, a.vocab, a.tile).swizzle);
  return GemmStatus::ok;
}

GemmStatus exp2_gemm(const Exp2Gemm& a) {
  if (refuse(a) != nullptr) return GemmStatus::refused;
  if (a.rows == 0) return GemmStatus::ok;
  return kLaunch[a.softcap > 0.0][a.tile](a, plan_exp2_gemm(a.rows, a.vocab, a.tile).swizzle);
}

#else

const char* exp2_gemm_built() { return ""; }
GemmStatus exp2_gemm_facts(const Exp2Gemm&, GemmFacts&) { return GemmStatus::not_built; }
GemmStatus exp2_gemm(const Exp2Gemm&) { return GemmStatus::not_built; }

#endif

}  // namespace mmrlhf::cuda
