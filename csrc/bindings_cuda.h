#pragma once

#include <nanobind/nanobind.h>

namespace mmrlhf {

// Adds the CUDA ops to the module. Only compiled where CMake found a working nvcc.
void bind_cuda(nanobind::module_& m);

}  // namespace mmrlhf
