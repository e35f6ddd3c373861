#include "preference.h"

#include <memory>
#include <vector>

namespace mmrlhf::cpu {
namespace {

ResponseSums sums_of(const PreferenceArguments& a, int64_t r) {
  constexpr int kLanes = 4;  // one sum alone would wait four cycles a token for the addition before
  ResponseSums lanes[kLanes];
  const int64_t end = a.end(r + 1);
  int64_t t = a.end(r);
  for (; t + kLanes <= end; t += kLanes) {
    for (int i = 0; i < kLanes; ++i) lanes[i].token(a, t + i);
  }
  for (int i = 0; t < end; ++t, ++i) lanes[i].token(a, t);
  for (int i = 1; i < kLanes; ++i) lanes[0].add(lanes[i]);
  return lanes[0];
}

}  // namespace

void preference(PreferenceArguments a) {
  const std::unique_ptr<double[]> scratch(new double[3 * a.responses + 2 * a.count]);
  a.scratch = scratch.get();
  for (int64_t r = 0; r < a.responses; ++r) sums_of(a, r).store(a, r);

  double delta = 0.0;
  if (a.settings.kind == LossKind::bco_pair) {
    for (int64_t p = 0; p < a.count; ++p) delta += pair_reward(a, p);
    delta /= static_cast<double>(a.count > 1 ? a.count : 1);
  }
  PairSums sums;
  const double share = one_over_pairs(a);
  for (int64_t p = 0; p < a.count; ++p) sums.pair(a, p, delta, share);
  sums.store(a);

  std::vector<ResponseGradient> gradients(a.responses);
  for (int64_t p = 0; p < a.count; ++p) {
    gradients[a.better(p)].better(a, p);
    gradients[a.worse(p)].worse(a, p);
  }
  const double tokens = sums.sft_tokens(a), mean_beta = sums.mean_beta(a);
  for (int64_t r = 0; r < a.responses; ++r) {
    a.rewards[r] = gradients[r].reward(a, r, mean_beta);
    const double by_weight = gradients[r].by_weight(a, r), sft = gradients[r].sft(a, tokens);
    for (int64_t t = a.end(r); t < a.end(r + 1); ++t) a.coef[t] = token_derivative(a, t, by_weight, sft);
  }
}

}  // namespace mmrlhf::cpu
