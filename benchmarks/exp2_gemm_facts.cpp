// What CUTLASS's host half says of exp2_gemm's kernels, on a machine without a GPU: benchmarks/cuda_check.py links this
// with them. Status 1 where a kernel has more shared memory than an SM, fewer than 3 stages (then loads no longer hide
// behind the multiplication), a workspace (nobody gives one), or refuses a shape.
#include <cstdio>

#include "../kernels/cuda/exp2_gemm.h"

using namespace mmrlhf::cuda;

int main() {
  constexpr int kSharedLimit = 232448;  // a block's on compute capability 9.0
  constexpr int64_t kRows[] = {1, 63, 64, 129, 1700, 16384, 1 << 20};
  constexpr int64_t kHeads[][2] = {{1, 8},          {257, 72},       {32001, 4096},   {50257, 768},  {128256, 4096},
                                   {151646, 3584}, {151936, 896}, {152064, 8192}, {256000, 2304}};
  int faults = 0;
  std::printf("%s, host side\n", exp2_gemm_built());
  constexpr struct {
    bool store;
    double softcap;
    const char* name;
  } kKinds[] = {{true, 0.0, "E and sums"}, {false, 0.0, "sums alone"}, {true, 30.0, "capped E"}, {false, 30.0, "capped"}};
  for (int tile = 0; tile < kGemmTileCount; ++tile) {
    for (const auto& [store, softcap, name] : kKinds) {
      GemmFacts facts{};
      int refused = 0;
      for (const int64_t rows : kRows) {
        for (const auto& [vocab, width] : kHeads) {
          Exp2Gemm a{};  // no pointer is followed; 16-byte aligned ones, so that all that could be looked at is right
          a.hidden = a.weight = reinterpret_cast<void*>(1 << 20);
          a.out = store ? reinterpret_cast<void*>(1 << 21) : nullptr;
          a.partial = reinterpret_cast<float*>(1 << 22);
          a.rows = rows, a.vocab = vocab, a.width = width, a.logit_scale = 1.0, a.softcap = softcap, a.tile = tile, a.multiprocessors = 132;
          a.hidden_stride = a.weight_stride = width, a.out_stride = (vocab + 15) / 16 * 16;
          if (exp2_gemm_facts(a, facts) != GemmStatus::ok || !facts.taken || facts.workspace_bytes != 0) {
            std::printf("    FAULT %s refuses rows %lld, vocab %lld, width %lld\n", kGemmTiles[tile].name,
                        static_cast<long long>(rows), static_cast<long long>(vocab), static_cast<long long>(width));
            ++refused;
          }
        }
      }
      std::printf("  exp2_gemm %-8s %-10s %6d B shared  %d stages  %d threads  %zu B workspace\n", kGemmTiles[tile].name,
                  name, facts.shared_bytes, facts.stages, facts.threads,
                  facts.workspace_bytes);
      if (facts.shared_bytes > kSharedLimit || facts.shared_bytes <= 0) {
        std::printf("    FAULT shared memory is over the %d B of sm_90\n", kSharedLimit);
        ++faults;
      }
      if (facts.stages < 3) {
        std::printf("    FAULT fewer than 3 stages\n");
        ++faults;
      }
      faults += refused;
    }
  }
  return faults == 0 ? 0 : 1;
}
