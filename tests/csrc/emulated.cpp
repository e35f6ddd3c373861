// The extension's CUDA half as a module of its own, its kernels compiled as host code and its tensors on the CPU. The
// runtime's thread has a device, which tests set, and calls that can be made to fail.
#include <utility>

#include "../../csrc/bindings_cuda.cpp"
#include "../../csrc/bindings_exp2_gemm.cpp"
#include "../../kernels/cuda/exp2_gemm_formula.cuh"

namespace {

struct Runtime {
  int device = 0, sets = 0;
  bool get_fails = false;
  int sets_succeed = 1 << 30;  // before they fail
  cudaError_t last = cudaSuccess;

  cudaError_t result(bool fails) {
    if (fails) last = cudaErrorInvalidDevice;
    return fails ? cudaErrorInvalidDevice : cudaSuccess;
  }
} runtime;

}  // namespace

extern "C" {
cudaError_t cudaGetDevice(int* device) {
  if (!runtime.get_fails) *device = runtime.device;
  return runtime.result(runtime.get_fails);
}
cudaError_t cudaSetDevice(int device) {
  const bool fails = runtime.sets++ >= runtime.sets_succeed;
  if (!fails) runtime.device = device;
  return runtime.result(fails);
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 132, cudaSuccess; }
cudaError_t cudaGetLastError() { return std::exchange(runtime.last, cudaSuccess); }
const char* cudaGetErrorString(cudaError_t) { return "emulated error"; }
}

NB_MODULE(_emulated, m) {
  using namespace nanobind::literals;
  mmrlhf::bind_cuda(m);
  mmrlhf::bind_exp2_gemm(m);  // its checks: there are no kernels behind them
  m.def("seed", [](uint64_t seed) { emulated::seed = seed; }, "Another order of the threads, from a number above 0.");
  m.def(
      "set_runtime", [](int device, bool get_fails, int sets_succeed) { runtime = {device, 0, get_fails, sets_succeed}; },
      "device"_a = 0, "get_fails"_a = false, "sets_succeed"_a = 1 << 30, "The thread's device, and which calls fail.");
  m.def(
      "runtime_state", [] { return nanobind::make_tuple(runtime.device, runtime.sets, static_cast<int>(runtime.last)); },
      "The thread's device, how often it was set, and the error that waits for the next launch.");
  m.def(
      "exponent",
      [](float acc, double logit_scale, float k) { return mmrlhf::exponent(acc, mmrlhf::split_gain(logit_scale), k); },
      "log2(E) of one accumulator, as the Hopper GEMM's epilogue makes it.");
}
