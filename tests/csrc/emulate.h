// CUDA's kernels as host code: included before everything else, it makes g++ take kernels/cuda/*.cu.
//
// A block's threads are fibers of one thread of the host. One warp at a time, in an order shuffled anew at every barrier,
// goes as far as the barriers let it, its lanes in a shuffled order too, so that a missing barrier shows as a wrong or
// changing result; blocks run one after another. A shuffle waits for all 32 lanes of its warp; where it cannot be met,
// because lanes have left or wait for the block, the program ends with a message. As on a device, a barrier waits for
// the threads that have not left. Not covered: atomics, asynchronous copies, memory spaces, and time.
#pragma once

#define MMRLHF_EMULATE 1

#include <cuda_runtime_api.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#define __global__ static
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace emulated {

inline uint3 thread_index, block_index;
inline dim3 grid_size;
inline uint64_t seed = 1;

enum class Waits { no, block, warp };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
  Waits waits = Waits::no;
  bool parity = false;
};

struct Slot {
  unsigned char bytes[2][8];
};

inline std::vector<Fiber> fibers;
inline std::vector<Slot> slots;
inline const std::function<void()>* body = nullptr;
inline ucontext_t scheduler;
inline unsigned current = 0;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulated kernel: %s (block %u, %u, thread %u)\n", what, block_index.x, block_index.y, current);
  std::abort();
}

inline void wait(Waits how) {
  fibers[current].waits = how;
  swapcontext(&fibers[current].context, &scheduler);
}

inline void enter() {
  (*body)();
  fibers[current].done = true;
  swapcontext(&fibers[current].context, &scheduler);
}

inline uint64_t random() {
  seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
  return seed;
}

inline void resume(unsigned thread) {
  current = thread;
  thread_index = {thread, 0, 0};
  swapcontext(&scheduler, &fibers[thread].context);
}

// Runs a warp until each of its threads has left or waits for the block.
inline void run_warp(unsigned first) {
  for (;;) {
    unsigned ready[32], count = 0, shuffling = 0, left = 0;
    for (unsigned t = first; t < first + 32; ++t) {
      if (fibers[t].done) {
        ++left;
      } else if (fibers[t].waits == Waits::no) {
        ready[count++] = t;
      } else {
        shuffling += fibers[t].waits == Waits::warp;
      }
    }
    if (count == 0) {
      if (shuffling == 0) return;
      if (shuffling < 32) fail(left > 0 ? "a shuffle among lanes of which some have left" : "a shuffle beside a barrier");
      for (unsigned t = first; t < first + 32; ++t) fibers[t].waits = Waits::no;
    }
    for (; count > 0; --count) {
      std::swap(ready[count - 1], ready[random() % count]);
      resume(ready[count - 1]);
    }
  }
}

// A warp at a time goes as far as the barriers let it, so that one is as far ahead of the others as can be.
inline void run_block(unsigned threads) {
  constexpr size_t kStack = 128 << 10;
  if (fibers.size() < threads) fibers.resize(threads), slots.resize(threads);
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& fiber = fibers[t];
    if (!fiber.stack) fiber.stack.reset(new char[kStack]);
    fiber.done = fiber.parity = false;
    fiber.waits = Waits::no;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &enter, 0);
  }
  std::vector<unsigned> warps(threads / 32);
  for (;;) {
    for (unsigned w = 0; w < warps.size(); ++w) warps[w] = 32 * w;
    for (size_t left = warps.size(); left > 0; --left) {
      std::swap(warps[left - 1], warps[random() % left]);
      run_warp(warps[left - 1]);
    }
    bool all = true;
    for (unsigned t = 0; t < threads; ++t) {
      all = all && fibers[t].done;
      fibers[t].waits = Waits::no;
    }
    if (all) return;
  }
}

template <typename T>
T exchange(T value, unsigned from) {
  static_assert(sizeof(T) <= 8, "a slot has 8 bytes");
  Fiber& fiber = fibers[current];
  const bool parity = fiber.parity;
  fiber.parity = !parity;  // two slots in turn: a lane may write its next value while others still read this one
  std::memcpy(slots[current].bytes[parity], &value, sizeof value);
  wait(Waits::warp);
  std::memcpy(&value, slots[current / 32 * 32 + from].bytes[parity], sizeof value);
  return value;
}

inline unsigned ballot(bool flag) {
  Fiber& fiber = fibers[current];
  const bool parity = fiber.parity;
  fiber.parity = !parity;
  slots[current].bytes[parity][0] = flag;
  wait(Waits::warp);
  unsigned flags = 0;
  for (unsigned lane = 0; lane < 32; ++lane) flags |= unsigned{slots[current / 32 * 32 + lane].bytes[parity][0]} << lane;
  return flags;
}

}  // namespace emulated

#define threadIdx (::emulated::thread_index)
#define blockIdx (::emulated::block_index)
#define gridDim (::emulated::grid_size)

inline void __syncthreads() { ::emulated::wait(::emulated::Waits::block); }

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  if (mask != 0xffffffffu) ::emulated::fail("a shuffle of some lanes");
  return ::emulated::exchange(value, (::emulated::current % 32) ^ static_cast<unsigned>(distance));
}

inline unsigned __ballot_sync(unsigned mask, bool flag) {
  if (mask != 0xffffffffu) ::emulated::fail("a ballot of some lanes");
  return ::emulated::ballot(flag);
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

namespace mmrlhf::cuda {

template <typename... Parameters, typename... Arguments>
cudaError_t start(void (*kernel)(Parameters...), dim3 grid, unsigned threads, cudaStream_t, Arguments... arguments) {
  // What a device refuses.
  if (grid.x == 0 || grid.y == 0 || grid.z != 1 || grid.x > 2147483647u || grid.y > 65535u) {
    return cudaErrorInvalidConfiguration;
  }
  if (threads == 0 || threads > 1024 || threads % 32 != 0) return cudaErrorInvalidConfiguration;
  const std::function<void()> body = [&] { kernel(arguments...); };
  ::emulated::body = &body;
  ::emulated::grid_size = grid;
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      ::emulated::block_index = {x, y, 0};
      ::emulated::run_block(threads);
    }
  }
  ::emulated::body = nullptr;
  return cudaGetLastError();  // as a launch does: what a call before it left
}

}  // namespace mmrlhf::cuda
