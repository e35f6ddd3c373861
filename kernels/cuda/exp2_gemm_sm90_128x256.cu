// exp2_gemm with tiles of 128x256: two groups of warps share a tile, 64 rows each.
#include "exp2_gemm_sm90.cuh"

namespace mmrlhf::cuda {

using Tiled = sm90::Tiled<cute::Shape<cute::_128, cute::_256, cute::_64>,
                          cutlass::gemm::KernelTmaWarpSpecializedCooperative,
                          cutlass::epilogue::TmaWarpSpecializedCooperative, /*kCapped=*/false>;

GemmStatus launch_128x256(const Exp2Gemm& arguments, int swizzle) { return Tiled::launch(arguments, swizzle); }
GemmFacts facts_128x256(const Exp2Gemm& arguments, int swizzle) { return Tiled::facts(arguments, swizzle); }

}  // namespace mmrlhf::cuda
