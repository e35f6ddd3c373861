// preference: token log-probabilities to the loss and its derivative for every token, one block, one launch.
//
// Three passes over short vectors with a barrier between: responses (sums over their tokens), pairs (loss and
// gradients), responses again (collect from pairs, write the tokens). A single block, because the passes need each other
// whole: a grid would need its blocks resident together, or a counter that a captured graph has to reset, to gain time
// that is not lost here. With R = 64 and N = 19,000 tokens one multiprocessor moves 16 B a token (logp and weight read,
// the weight again, the derivative written), 0.3 MB at the 64 B a clock of its L2 port: 3 us, beside three rounds of
// memory latency and the launch itself, about 2 us each. From some 100,000 tokens on it would pay to spread the walk
// over the device; there the head before it takes a thousand times as long.
// Deterministic: no atomics; every sum has one order. A response collects its gradient by looking through all pairs,
// R * P comparisons, a lane a pair. Where there are fewer responses than warps, several warps share one.
#include "device.cuh"
#include "launch.h"
#include "preference_formulas.cuh"

namespace mmrlhf::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kMostSums = 5;  // doubles of the largest struct of sums

// A struct of doubles as an array of them.
template <typename Sums>
struct Doubles {
  static constexpr int kCount = sizeof(Sums) / sizeof(double);
  static_assert(sizeof(Sums) % sizeof(double) == 0 && kCount <= kMostSums, "sums are doubles, at most kMostSums");
  union {
    Sums sums;
    double values[kCount];
  };

  __device__ explicit Doubles(const Sums& from) : sums(from) {}

  __device__ void add_lanes() {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = lane_sum(values[i]);
  }
};

// Sum over the block, the same in every thread. Memory written before it is seen by every thread after it.
template <typename Sums>
__device__ Sums block_sum(const Sums& own, double* shared) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  Doubles<Sums> all(own);
  all.add_lanes();
  __syncthreads();  // whoever still reads `shared` from before
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < all.kCount; ++i) shared[warp * all.kCount + i] = all.values[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < all.kCount; ++i) all.values[i] = lane < kWarps ? shared[lane * all.kCount + i] : 0.0;
  all.add_lanes();
  return all.sums;
}

// How the warps are dealt to responses: `size` warps a response, a power of two.
struct Teams {
  int size, count, team, member;

  __device__ Teams(int team_warps)
      : size(team_warps),
        count(kWarps / team_warps),
        team(static_cast<int>(threadIdx.x) / kWarpSize / team_warps),
        member(static_cast<int>(threadIdx.x) / kWarpSize % team_warps) {}

  __device__ int first_token() const { return member * kWarpSize + static_cast<int>(threadIdx.x) % kWarpSize; }
  __device__ int token_step() const { return size * kWarpSize; }
  __device__ bool leads() const { return member == 0 && threadIdx.x % kWarpSize == 0; }
};

__device__ void score_responses(const PreferenceArguments& a, const Teams& teams, double* shared) {
  constexpr int kSums = Doubles<ResponseSums>::kCount;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  for (int64_t base = 0; base < a.responses; base += teams.count) {  // as often in every thread: there are barriers
    const int64_t r = base + teams.team;
    ResponseSums own;
    if (r < a.responses) {
      const int64_t end = a.end(r + 1);
#pragma unroll 4
      for (int64_t t = a.end(r) + teams.first_token(); t < end; t += teams.token_step()) own.token(a, t);
    }
    Doubles<ResponseSums> all(own);
    all.add_lanes();
    if (teams.size > 1) {
      if (lane == 0) {
#pragma unroll
        for (int i = 0; i < kSums; ++i) shared[warp * kSums + i] = all.values[i];
      }
      __syncthreads();
      if (teams.leads()) {
        for (int other = 1; other < teams.size; ++other) {
#pragma unroll
          for (int i = 0; i < kSums; ++i) all.values[i] += shared[(warp + other) * kSums + i];
        }
      }
      __syncthreads();
    }
    if (r < a.responses && teams.leads()) all.sums.store(a, r);
  }
}

__device__ PairSums lose_pairs(const PreferenceArguments& a, double* shared) {
  struct One {
    double value;
  };
  double delta = 0.0;
  if (a.settings.kind == LossKind::bco_pair) {
    One own{0.0};
    for (int64_t p = threadIdx.x; p < a.count; p += kThreads) own.value += pair_reward(a, p);
    delta = block_sum(own, shared).value / static_cast<double>(a.count > 1 ? a.count : 1);
  }
  PairSums own;
  const double share = one_over_pairs(a);
  for (int64_t p = threadIdx.x; p < a.count; p += kThreads) own.pair(a, p, delta, share);
  return block_sum(own, shared);
}

__device__ void differentiate_responses(const PreferenceArguments& a, const Teams& teams, double sft_tokens,
                                        double mean_beta) {
  for (int64_t r = teams.team; r < a.responses; r += teams.count) {
    ResponseGradient own;
    for (int64_t p = threadIdx.x % kWarpSize; p < a.count; p += kWarpSize) {
      if (a.better(p) == r) own.better(a, p);
      if (a.worse(p) == r) own.worse(a, p);
    }
    Doubles<ResponseGradient> all(own);
    all.add_lanes();
    if (teams.leads()) a.rewards[r] = all.sums.reward(a, r, mean_beta);
    const double by_weight = all.sums.by_weight(a, r), sft = all.sums.sft(a, sft_tokens);
    const int64_t end = a.end(r + 1);
#pragma unroll 4
    for (int64_t t = a.end(r) + teams.first_token(); t < end; t += teams.token_step()) {
      a.coef[t] = token_derivative(a, t, by_weight, sft);
    }
  }
}

__global__ void __launch_bounds__(kThreads) preference_kernel(const PreferenceArguments a, int team_warps) {
  __shared__ double shared[kWarps * kMostSums];
  const Teams teams(team_warps);
  score_responses(a, teams, shared);
  __syncthreads();
  const PairSums sums = lose_pairs(a, shared);
  if (threadIdx.x == 0) sums.store(a);
  differentiate_responses(a, teams, sums.sft_tokens(a), sums.mean_beta(a));
}

}  // namespace

int preference_team_warps(int64_t responses) {
  int warps = 1;
  while (2 * warps * (responses > 1 ? responses : 1) <= kWarps) warps *= 2;
  return warps;
}

cudaError_t preference(const PreferenceArguments& arguments, cudaStream_t stream) {
  return start(preference_kernel, dim3(1), kThreads, stream, arguments, preference_team_warps(arguments.responses));
}

}  // namespace mmrlhf::cuda
