// For bindings that launch on a CUDA device: the device is set for the call and restored, an error becomes a
// RuntimeError.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace mmrlhf {

inline void throw_on_error(const char* op, cudaError_t status) {
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
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  ~DeviceGuard() { cudaSetDevice(before); }
};

}  // namespace mmrlhf
