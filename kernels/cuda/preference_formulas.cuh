// From token log-probabilities to a preference loss and its derivative: the arithmetic that host and device share.
//
//   response_sums (tokens of a response) -> score -> loss_term (a pair) -> response gradient -> token_derivative
//
// Each function is one step for one token, response or pair; csrc/cpu/preference.cpp walks over them in loops,
// kernels/cuda/preference.cu with threads, so the CPU tests exercise what the device computes. All in double: the
// vectors are short (R responses, P pairs), the sums over tokens need it, and with 53 bits the terms below keep float32's
// relative precision at any margin without tricks beyond log1p, expm1 and a sigmoid that never passes through inf.
// The terms are the rows of mmrlhf/ops/loss_kinds.py, in its order, each with its derivatives.
#pragma once

#include "formulas.cuh"

namespace mmrlhf {

enum class LossKind : int32_t {
  sigmoid,
  hinge,
  ipo,
  robust,
  exo_pair,
  nca_pair,
  bco_pair,
  sppo_hard,
  apo_zero,
  apo_down,
  discopop,
  simpo,
  orpo,
};

constexpr const char* kLossKinds[] = {"sigmoid",   "hinge",    "ipo",      "robust",   "exo_pair", "nca_pair", "bco_pair",
                                      "sppo_hard", "apo_zero", "apo_down", "discopop", "simpo",    "orpo"};
constexpr int kLossKindCount = static_cast<int>(sizeof kLossKinds / sizeof kLossKinds[0]);

struct LossSettings {
  LossKind kind = LossKind::sigmoid;
  double label_smoothing = 0.0;
  double gamma_beta_ratio = 0.5;
  double discopop_tau = 0.05;
};

// What preference() reads and writes. Pointers may be null where that is said.
struct PreferenceArguments {
  const float* logp;              // [N]
  const float* token_weight;      // [N] or null: 1
  const void* cu_seqlens;         // [R + 1] int64, or int32
  const void* pairs;              // [P, 2] (better, worse) int64, or int32
  const float* reference_scores;  // [R] or null: 0
  const float* beta;              // [P] with beta_stride 1, [1] with 0, or null: beta_value
  const float* margin;            // [P] or null: with it, beta is scaled by Dynamic Reward Scaling with w and k
  const float* pair_weight;       // [P] or null: 1
  const double* num_pairs;        // [1] or null: num_pairs_value
  const double* num_sft_tokens;   // [1] or null: num_sft_value, and where that is 0 the better responses' tokens
  float* scores;                  // [R] out
  float* rewards;                 // [R] out
  float* losses;                  // [P] out
  float* margins;                 // [P] out
  float* betas;                   // [P] out
  float* coef;                    // [N] out: d loss / d logp
  float* loss;                    // [1] out
  float* accuracy;                // [1] out
  float* sft_loss;                // [1] out
  double* scratch;                // [3 R + 2 P]: score, divisor and plain sum of a response; gradients of a pair
  int64_t responses, count;       // R, P
  bool wide_ends, wide_pairs;     // int64 and not int32
  bool mean;                      // a score is divided by its weights
  bool beta_a_pair;               // rewards take the mean over a response's pairs
  int32_t beta_stride;
  double beta_value, w, k, num_pairs_value, num_sft_value, sft_weight;
  LossSettings settings;

  MMRLHF_HD double* score() const { return scratch; }
  MMRLHF_HD double* divisor() const { return scratch + responses; }
  MMRLHF_HD double* plain() const { return scratch + 2 * responses; }
  MMRLHF_HD double* grad_better() const { return scratch + 3 * responses; }
  MMRLHF_HD double* grad_worse() const { return scratch + 3 * responses + count; }

  MMRLHF_HD int64_t end(int64_t r) const { return at(cu_seqlens, wide_ends, r); }
  MMRLHF_HD int64_t better(int64_t p) const { return at(pairs, wide_pairs, 2 * p); }
  MMRLHF_HD int64_t worse(int64_t p) const { return at(pairs, wide_pairs, 2 * p + 1); }

  MMRLHF_HD static int64_t at(const void* values, bool wide, int64_t i) {
    return wide ? read_only(static_cast<const int64_t*>(values) + i) : read_only(static_cast<const int32_t*>(values) + i);
  }
};

// 1 / (1 + exp(-x)).
MMRLHF_HD double sigmoid(double x) {
  const double small = exp(-fabs(x));
  return (x >= 0.0 ? 1.0 : small) / (1.0 + small);
}

// log(sigmoid(x)).
MMRLHF_HD double log_sigmoid(double x) { return (x < 0.0 ? x : 0.0) - log1p(exp(-fabs(x))); }

// Derivative of sigmoid: sigmoid(x) sigmoid(-x).
MMRLHF_HD double sigmoid_slope(double x) {
  const double small = exp(-fabs(x));
  return small / ((1.0 + small) * (1.0 + small));
}

// beta (1 + w (1 - exp(-k margin))), held in [beta, (1 + w) beta]; a NaN margin is a pair without one (MM-RLHF, 4).
MMRLHF_HD double dynamic_beta(double beta, double margin, double w, double k) {
  return beta * (1.0 - w * expm1(-k * (margin > 0.0 ? margin : 0.0)));
}

// A value and its derivative.
struct Dual {
  double value, slope;
};

// log(p / (1 - p)) of logp, held at logp = -1e-7: the odds of 1 are infinite.
MMRLHF_HD Dual log_odds(double logp) {
  const bool held = logp > -1e-7;
  const double at = held ? -1e-7 : logp;
  const double other = -expm1(at);
  return {at - log(other), held ? 0.0 : 1.0 / other};
}

// A loss of x = beta (b - w) alone, and its derivative by x.
MMRLHF_HD Dual margin_term(LossKind kind, double x, const LossSettings& s) {
  const double eps = s.label_smoothing, up = sigmoid(x), down = sigmoid(-x);
  const double log_up = log_sigmoid(x), log_down = log_sigmoid(-x);
  switch (kind) {
    case LossKind::hinge:
      return x >= 1.0 ? Dual{0.0, 0.0} : Dual{1.0 - x, -1.0};
    case LossKind::robust:
      return {(-(1.0 - eps) * log_up + eps * log_down) / (1.0 - 2.0 * eps),
              (-(1.0 - eps) * down - eps * up) / (1.0 - 2.0 * eps)};
    case LossKind::exo_pair: {
      const double keep = log1p(-eps), flip = log(eps);
      return {up * (log_up - keep) + down * (log_down - flip), up * down * (x - keep + flip)};
    }
    case LossKind::discopop: {
      const double mix = x / s.discopop_tau, off = sigmoid(-mix);
      const double rest = exp(log_sigmoid(mix) - x);  // one exponential: apart, a margin of -1000 gives 0 * inf
      return {-log_up * off + rest, -down * off + log_up * sigmoid_slope(mix) / s.discopop_tau +
                                        rest * (off / s.discopop_tau - 1.0)};
    }
    default:  // sigmoid
      return {-(1.0 - eps) * log_up - eps * log_down, -(1.0 - eps) * down + eps * up};
  }
}

struct Term {
  double loss, by_better, by_worse;
};

// Loss of a pair with log-ratios b (better) and v (worse), and its derivatives by them. `delta` is bco_pair's.
MMRLHF_HD Term loss_term(double b, double v, double beta, double delta, const LossSettings& s) {
  switch (s.kind) {
    case LossKind::ipo: {
      const double off = b - v - 0.5 / beta;
      return {off * off, 2.0 * off, -2.0 * off};
    }
    case LossKind::nca_pair:
      return {-log_sigmoid(beta * b) - 0.5 * log_sigmoid(-beta * b) - 0.5 * log_sigmoid(-beta * v),
              beta * (-sigmoid(-beta * b) + 0.5 * sigmoid(beta * b)), 0.5 * beta * sigmoid(beta * v)};
    case LossKind::bco_pair:
      return {-log_sigmoid(beta * b - delta) - log_sigmoid(delta - beta * v), -beta * sigmoid(delta - beta * b),
              beta * sigmoid(beta * v - delta)};
    case LossKind::sppo_hard: {
      const double up = b - 0.5 / beta, down = v + 0.5 / beta;
      return {up * up + down * down, 2.0 * up, 2.0 * down};
    }
    case LossKind::apo_zero:
      return {sigmoid(-beta * b) + sigmoid(beta * v), -beta * sigmoid_slope(beta * b), beta * sigmoid_slope(beta * v)};
    case LossKind::apo_down: {
      const double slope = beta * sigmoid_slope(beta * (b - v));
      return {sigmoid(beta * b) + sigmoid(-beta * (b - v)), beta * sigmoid_slope(beta * b) - slope, slope};
    }
    case LossKind::orpo: {
      const Dual up = log_odds(b), down = log_odds(v);
      const double outer = -beta * sigmoid(down.value - up.value);
      return {-beta * log_sigmoid(up.value - down.value), outer * up.slope, -outer * down.slope};
    }
    default: {
      const bool simpo = s.kind == LossKind::simpo;
      const double x = beta * (simpo ? b - s.gamma_beta_ratio - v : b - v);
      const Dual term = margin_term(simpo ? LossKind::sigmoid : s.kind, x, s);
      return {term.value, beta * term.slope, -beta * term.slope};
    }
  }
}

MMRLHF_HD double token_weight(const PreferenceArguments& a, int64_t t) {
  return a.token_weight == nullptr ? 1.0 : static_cast<double>(read_only(a.token_weight + t));
}

// Sums over tokens of a response, any part of them.
struct ResponseSums {
  double weighted = 0.0, weight = 0.0, plain = 0.0;

  MMRLHF_HD void token(const PreferenceArguments& a, int64_t t) {
    const double value = read_only(a.logp + t), one = token_weight(a, t);
    // A token of weight 0 adds nothing, even if its log-probability is not finite.
    weighted += one == 0.0 ? 0.0 : one * value;
    weight += one;
    plain += value;
  }

  MMRLHF_HD void add(const ResponseSums& other) {
    weighted += other.weighted;
    weight += other.weight;
    plain += other.plain;
  }

  MMRLHF_HD void store(const PreferenceArguments& a, int64_t r) const {
    const double divisor = a.mean && weight != 0.0 ? weight : 1.0;
    // Rounded as reference scores are (ops.sequence_score): before the first update a policy equals its reference to the
    // last bit, and its rewards are 0, not 1e-7 of either sign, which half the pairs would count as won.
    const float score = static_cast<float>(weighted / divisor);
    a.scores[r] = score;
    a.score()[r] = score;
    a.divisor()[r] = divisor;
    a.plain()[r] = plain;
  }
};

// Log-ratio of a response.
MMRLHF_HD double log_ratio(const PreferenceArguments& a, int64_t r) {
  return a.reference_scores == nullptr ? a.score()[r] : a.score()[r] - read_only(a.reference_scores + r);
}

MMRLHF_HD double beta_of(const PreferenceArguments& a, int64_t p) {
  const double beta = a.beta == nullptr ? a.beta_value : static_cast<double>(read_only(a.beta + p * a.beta_stride));
  return a.margin == nullptr ? beta : dynamic_beta(beta, read_only(a.margin + p), a.w, a.k);
}

// What a pair adds to bco_pair's delta, P times the mean reward over all pairs.
MMRLHF_HD double pair_reward(const PreferenceArguments& a, int64_t p) {
  return 0.5 * beta_of(a, p) * (log_ratio(a, a.better(p)) + log_ratio(a, a.worse(p)));
}

// Sums over pairs, any part of them.
struct PairSums {
  double loss = 0.0, right = 0.0, beta = 0.0, better_tokens = 0.0, better_logp = 0.0;

  // One pair: its outputs are written, its share of the sums is added. 1 / num_pairs is `share`.
  MMRLHF_HD void pair(const PreferenceArguments& a, int64_t p, double delta, double share) {
    const int64_t better = a.better(p);
    const double b = log_ratio(a, better), v = log_ratio(a, a.worse(p)), scale = beta_of(a, p);
    const Term term = loss_term(b, v, scale, delta, a.settings);
    const double gap = scale * (b - v), own = a.pair_weight == nullptr ? share : share * read_only(a.pair_weight + p);
    a.losses[p] = static_cast<float>(term.loss);
    a.margins[p] = static_cast<float>(gap);
    a.betas[p] = static_cast<float>(scale);
    a.grad_better()[p] = term.by_better * own;
    a.grad_worse()[p] = term.by_worse * own;
    loss += term.loss * own;
    right += gap > 0.0 ? 1.0 : 0.0;
    beta += scale;
    better_tokens += static_cast<double>(a.end(better + 1) - a.end(better));
    better_logp += a.plain()[better];
  }

  MMRLHF_HD void add(const PairSums& other) {
    loss += other.loss;
    right += other.right;
    beta += other.beta;
    better_tokens += other.better_tokens;
    better_logp += other.better_logp;
  }

  // What the sft term is divided by.
  MMRLHF_HD double sft_tokens(const PreferenceArguments& a) const {
    const double given = a.num_sft_tokens == nullptr ? a.num_sft_value : *a.num_sft_tokens;
    return given > 0.0 ? given : better_tokens > 1.0 ? better_tokens : 1.0;
  }

  MMRLHF_HD double mean_beta(const PreferenceArguments& a) const {
    return beta / static_cast<double>(a.count > 1 ? a.count : 1);
  }

  MMRLHF_HD void store(const PreferenceArguments& a) const {
    const double sft = -better_logp / sft_tokens(a);
    // An unused sft term must not turn the loss non-finite.
    *a.loss = static_cast<float>(a.sft_weight == 0.0 ? loss : loss + a.sft_weight * sft);
    *a.accuracy = static_cast<float>(right / static_cast<double>(a.count > 1 ? a.count : 1));
    *a.sft_loss = static_cast<float>(sft);
  }
};

MMRLHF_HD double one_over_pairs(const PreferenceArguments& a) {
  return 1.0 / (a.num_pairs == nullptr ? a.num_pairs_value : *a.num_pairs);
}

// What a response collects from pairs it is in, any part of them.
struct ResponseGradient {
  double grad = 0.0, times_better = 0.0, times = 0.0, beta = 0.0;

  MMRLHF_HD void better(const PreferenceArguments& a, int64_t p) {
    grad += a.grad_better()[p];
    times_better += 1.0;
    times += 1.0;
    beta += a.betas[p];
  }

  MMRLHF_HD void worse(const PreferenceArguments& a, int64_t p) {
    grad += a.grad_worse()[p];
    times += 1.0;
    beta += a.betas[p];
  }

  // The beta of the response's reward: its pairs' mean, and all pairs' mean where it is in none.
  MMRLHF_HD float reward(const PreferenceArguments& a, int64_t r, double mean_beta) const {
    const double own = !a.beta_a_pair ? beta_of(a, 0) : times > 0.0 ? beta / times : mean_beta;
    return static_cast<float>(own * log_ratio(a, r));
  }

  MMRLHF_HD double by_weight(const PreferenceArguments& a, int64_t r) const { return grad / a.divisor()[r]; }

  MMRLHF_HD double sft(const PreferenceArguments& a, double sft_tokens) const {
    return -a.sft_weight * times_better / sft_tokens;
  }
};

// d loss / d logp of token t, from its response's derivative by weight * logp and through the sft term.
MMRLHF_HD float token_derivative(const PreferenceArguments& a, int64_t t, double by_weight, double sft) {
  const double one = token_weight(a, t);
  return static_cast<float>((one == 0.0 ? 0.0 : one * by_weight) + sft);
}

}  // namespace mmrlhf
