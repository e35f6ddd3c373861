// For bindings that launch on a CUDA device: the device is set for the call and restored, an error becomes a
// RuntimeError.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace mmrlhf {

// The runtime keeps a call's error until it is asked for it, and a launch asks: taken back here, it is said once.
inline void throw_on_error(const char* op, cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();
  std::string text = std::string(op) + ": " + cudaGetErrorString(status);
  if (status == cudaErrorNoKernelImageForDevice) text += "; this build holds " MMRLHF_CUDA_ARCHS;
  throw std::runtime_error(text);
}

// Nothing is set where the thread is on the device already: setting one may create its context. Where the device cannot
// be set, nothing is launched and there is nothing to restore. Where the one before cannot be set again, the op has been
// launched and a destructor must not throw: that error is dropped.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    int current = 0;
    throw_on_error("cudaGetDevice", cudaGetDevice(&current));
    if (current == device) return;
    throw_on_error("cudaSetDevice", cudaSetDevice(device));
    before_ = current;
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  ~DeviceGuard() {
    if (before_ >= 0 && cudaSetDevice(before_) != cudaSuccess) cudaGetLastError();
  }

 private:
  int before_ = -1;  // the device to go back to, if it was changed
};

}  // namespace mmrlhf
