#pragma once

#include <nanobind/nanobind.h>

namespace mmrlhf {

void bind_exp2_gemm(nanobind::module_& m);

// "CUTLASS 4.2.0", or "" where the build had no headers of it.
const char* exp2_gemm_built();

}  // namespace mmrlhf
