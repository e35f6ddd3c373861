// CUDA half of the bindings: the device is set for the call and restored, an error becomes a RuntimeError.
#include "bindings_cuda.h"

#include <nanobind/stl/optional.h>

#include <stdexcept>

#include "../kernels/cuda/launch.h"
#include "checks.h"

namespace mmrlhf {
namespace {

void throw_on_error(const char* op, cudaError_t status) {
  if (status == cudaSuccess) return;
  std::string text = std::string(op) + ": " + cudaGetErrorString(status);
  if (status == cudaErrorNoKernelImageForDevice) text += "; this build holds " MMRLHF_CUDA_ARCHS;
  throw std::runtime_error(text);
}

struct DeviceGuard {
  int before = 0;

  explicit DeviceGuard(int device) {
    throw_on_error("cudaGetDevice", cudaGetDevice(&before));
    throw_on_error("cudaSetDevice", cudaSetDevice(device));
  }
  ~DeviceGuard() { cudaSetDevice(before); }
};

void exp2_rowsum_cuda(const Array& tile, const Array& offset, const Array& sums, const std::optional<Array>& target_col,
                      const std::optional<Array>& target_exp, bool accumulate, uintptr_t stream) {
  const Exp2RowsumArguments a(tile, offset, sums, target_col, target_exp, nb::device::cuda::value);
  const int device = tile.device_id();
  nb::gil_scoped_release unlocked;
  const DeviceGuard guard(device);
  throw_on_error("exp2_rowsum_cuda",
                 cuda::exp2_rowsum(a.tile, a.offset, a.sums, a.target_col, a.target_exp, a.rows, a.cols, a.stride,
                                   accumulate, reinterpret_cast<cudaStream_t>(stream)));
}

}  // namespace

void bind_cuda(nb::module_& m) {
  using namespace nb::literals;
  m.def("exp2_rowsum_cuda", &exp2_rowsum_cuda, "tile"_a.noconvert(), "offset"_a.noconvert(), "sums"_a.noconvert(),
        nb::kw_only(), "target_col"_a.noconvert() = nb::none(), "target_exp"_a.noconvert() = nb::none(),
        "accumulate"_a = false, "stream"_a);
}

}  // namespace mmrlhf
