// The extension's CUDA half as a module of its own, its kernels compiled as host code and its tensors on the CPU.
#include "../../csrc/bindings_cuda.cpp"

extern "C" {
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "emulated error"; }
}

NB_MODULE(_emulated, m) {
  mmrlhf::bind_cuda(m);
  m.def("seed", [](uint64_t seed) { emulated::seed = seed; }, "Another order of the threads, from a number above 0.");
}
