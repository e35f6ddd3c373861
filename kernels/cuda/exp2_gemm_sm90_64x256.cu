// exp2_gemm with tiles of 64x256.
#include "exp2_gemm_sm90.cuh"

namespace mmrlhf::cuda {

using Tiled = sm90::Tiled64x256</*kCapped=*/false>;

GemmStatus launch_64x256(const Exp2Gemm& arguments, int swizzle) { return Tiled::launch(arguments, swizzle); }
GemmFacts facts_64x256(const Exp2Gemm& arguments, int swizzle) { return Tiled::facts(arguments, swizzle); }

}  // namespace mmrlhf::cuda
