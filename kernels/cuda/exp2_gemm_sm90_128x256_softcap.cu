// exp2_gemm of capped logits with tiles of 128x256.
#include "exp2_gemm_sm90.cuh"

namespace mmrlhf::cuda {

using Tiled = sm90::Tiled128x256</*kCapped=*/true>;

GemmStatus launch_128x256_softcap(const Exp2Gemm& arguments, int swizzle) { return Tiled::launch(arguments, swizzle); }
GemmFacts facts_128x256_softcap(const Exp2Gemm& arguments, int swizzle) { return Tiled::facts(arguments, swizzle); }

}  // namespace mmrlhf::cuda
