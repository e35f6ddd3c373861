// Arguments of preference, checked, and its binding: the same on every device.
#pragma once

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include "../kernels/cuda/preference_formulas.cuh"
#include "checks.h"

namespace mmrlhf {

inline LossKind kind_named(const std::string& asked) {
  std::string allowed;
  for (int i = 0; i < kLossKindCount; ++i) {
    if (asked == kLossKinds[i]) return static_cast<LossKind>(i);
    allowed += std::string(i ? ", " : "") + kLossKinds[i];
  }
  throw value_error("kind must be one of " + allowed + ", got '" + asked + "'");
}

// int32 or int64; whether it is the wide one.
inline bool check_indices(const char* name, const Array& array, std::initializer_list<int64_t> shape, int device_type,
                          int device) {
  if (array.dtype() == nb::dtype<int32_t>()) {
    check_array<int32_t>(name, array, shape, device_type, device);
    return false;
  }
  check_array<int64_t>(name, array, shape, device_type, device);
  return true;
}

// m.def(name): run(arguments, device, extra...), with the arguments checked to be on `device_type`. `extras` name the
// keyword arguments of `run` that follow the common ones.
template <typename... Extra, typename... Names>
void def_preference(nb::module_& m, const char* name, int device_type,
                    void (*run)(const PreferenceArguments&, int64_t tokens, int device, Extra...),
                    const Names&... extras) {
  using namespace nb::literals;
  using Optional = std::optional<Array>;
  m.def(
      name,
      [device_type, run](const Array& logp, const Array& cu_seqlens, const Array& pairs, const Array& scores,
                         const Array& rewards, const Array& losses, const Array& margins, const Array& betas,
                         const Array& coef, const Array& loss, const Array& accuracy, const Array& sft_loss,
                         const Optional& token_weight, const Optional& reference_scores, double beta,
                         const Optional& beta_tensor, const Optional& margin, double w, double k,
                         const Optional& pair_weight, const std::string& kind, bool mean, double label_smoothing,
                         double gamma_beta_ratio, double discopop_tau, double num_pairs, double num_sft_tokens,
                         double sft_weight, Extra... extra) {
        const int on = device_type, device = logp.device_id();
        if (logp.ndim() != 1) throw value_error("logp must have shape [N], got " + shape_of(logp));
        if (cu_seqlens.ndim() != 1 || cu_seqlens.shape(0) < 1) {
          throw value_error("cu_seqlens must have shape [R + 1], got " + shape_of(cu_seqlens));
        }
        if (pairs.ndim() != 2) throw value_error("pairs must have shape [P, 2], got " + shape_of(pairs));
        const auto N = static_cast<int64_t>(logp.shape(0)), R = static_cast<int64_t>(cu_seqlens.shape(0)) - 1;
        const auto P = static_cast<int64_t>(pairs.shape(0));
        PreferenceArguments a{};
        a.logp = check_array<float>("logp", logp, {N}, on, device);
        a.wide_ends = check_indices("cu_seqlens", cu_seqlens, {R + 1}, on, device);
        a.cu_seqlens = cu_seqlens.data();
        a.wide_pairs = check_indices("pairs", pairs, {P, 2}, on, device);
        a.pairs = pairs.data();
        a.scores = check_array<float>("scores", scores, {R}, on, device);
        a.rewards = check_array<float>("rewards", rewards, {R}, on, device);
        a.losses = check_array<float>("losses", losses, {P}, on, device);
        a.margins = check_array<float>("margins", margins, {P}, on, device);
        a.betas = check_array<float>("betas", betas, {P}, on, device);
        a.coef = check_array<float>("coef", coef, {N}, on, device);
        a.loss = check_array<float>("loss", loss, {}, on, device);
        a.accuracy = check_array<float>("accuracy", accuracy, {}, on, device);
        a.sft_loss = check_array<float>("sft_loss", sft_loss, {}, on, device);
        a.token_weight = check_optional<float>("token_weight", token_weight, {N}, on, device);
        a.reference_scores = check_optional<float>("reference_scores", reference_scores, {R}, on, device);
        a.margin = check_optional<float>("margin", margin, {P}, on, device);
        a.pair_weight = check_optional<float>("pair_weight", pair_weight, {P}, on, device);
        const bool each = beta_tensor && beta_tensor->ndim() > 0;
        if (each) a.beta = check_array<float>("beta_tensor", *beta_tensor, {P}, on, device);
        if (beta_tensor && !each) a.beta = check_array<float>("beta_tensor", *beta_tensor, {}, on, device);
        a.beta_stride = each ? 1 : 0;
        a.beta_a_pair = each || margin.has_value();
        a.responses = R;
        a.count = P;
        a.mean = mean;
        a.beta_value = beta;
        a.w = w;
        a.k = k;
        a.num_pairs_value = num_pairs;
        a.num_sft_value = num_sft_tokens;
        a.sft_weight = sft_weight;
        a.settings = {kind_named(kind), label_smoothing, gamma_beta_ratio, discopop_tau};
        run(a, N, device, extra...);
      },
      "logp"_a.noconvert(), "cu_seqlens"_a.noconvert(), "pairs"_a.noconvert(), "scores"_a.noconvert(),
      "rewards"_a.noconvert(), "losses"_a.noconvert(), "margins"_a.noconvert(), "betas"_a.noconvert(),
      "coef"_a.noconvert(), "loss"_a.noconvert(), "accuracy"_a.noconvert(), "sft_loss"_a.noconvert(), nb::kw_only(),
      "token_weight"_a.noconvert() = nb::none(), "reference_scores"_a.noconvert() = nb::none(), "beta"_a = 0.1,
      "beta_tensor"_a.noconvert() = nb::none(), "margin"_a.noconvert() = nb::none(), "w"_a = 0.5, "k"_a = 0.5,
      "pair_weight"_a.noconvert() = nb::none(), "kind"_a = "sigmoid", "mean"_a = false, "label_smoothing"_a = 0.0,
      "gamma_beta_ratio"_a = 0.5, "discopop_tau"_a = 0.05, "num_pairs"_a = 1.0, "num_sft_tokens"_a = 0.0,
      "sft_weight"_a = 0.0, extras...);
}

}  // namespace mmrlhf
