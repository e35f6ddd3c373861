// What of exp2_gemm runs on a host, for ctypes: test_exp2_gemm.py compiles it with kernels/cuda/exp2_gemm.cpp.
#include "../../kernels/cuda/exp2_gemm.h"
#include "../../kernels/cuda/exp2_gemm_formula.cuh"

using namespace mmrlhf;

extern "C" {

int pick(int64_t rows, int64_t vocab, int multiprocessors) { return cuda::pick_gemm_tile(rows, vocab, multiprocessors); }

// tiles, padded_rows, row_step, swizzle, and the tile's rows and columns
void plan(int64_t rows, int64_t vocab, int tile, int64_t* out) {
  const cuda::GemmPlan p = cuda::plan_exp2_gemm(rows, vocab, tile);
  const cuda::GemmTile& shape = cuda::kGemmTiles[tile];
  const int64_t values[] = {p.tiles, p.padded_rows, p.row_step, p.swizzle, shape.rows, shape.columns};
  for (int i = 0; i < 6; ++i) out[i] = values[i];
}

const char* name_of(int tile) { return cuda::kGemmTiles[tile].name; }
int tile_count() { return cuda::kGemmTileCount; }
int tile_named(const char* name) { return cuda::gemm_tile_named(name); }

// sizes: rows, vocab, width, hidden_stride, weight_stride, out_stride; addresses: hidden, weight, out, partial
const char* refusal(const int64_t* sizes, const uint64_t* addresses, int tile) {
  cuda::Exp2Gemm a{};
  a.rows = sizes[0], a.vocab = sizes[1], a.width = sizes[2];
  a.hidden_stride = sizes[3], a.weight_stride = sizes[4], a.out_stride = sizes[5];
  a.hidden = reinterpret_cast<void*>(addresses[0]), a.weight = reinterpret_cast<void*>(addresses[1]);
  a.out = reinterpret_cast<void*>(addresses[2]), a.partial = reinterpret_cast<float*>(addresses[3]);
  a.tile = tile;
  return cuda::refuse(a);
}

const char* message(int status) { return cuda::message_of(static_cast<cuda::GemmStatus>(status)); }
const char* built() { return cuda::exp2_gemm_built(); }
int launch() { return static_cast<int>(cuda::exp2_gemm({})); }

// The epilogue's arithmetic: E and t for n accumulators of one row; bias may be null.
void exponentials(const float* acc, const float* bias, double logit_scale, float k, float* t, float* e, int64_t n) {
  const Gain gain = split_gain(logit_scale);
  for (int64_t i = 0; i < n; ++i) {
    t[i] = exponent(acc[i], gain, k);
    if (bias != nullptr) t[i] = add_bias(t[i], bias[i]);
    e[i] = power_of_two(t[i]);
  }
}

// The same with a cap: E, and E times the slope.
void capped(const float* acc, const float* bias, double logit_scale, double softcap, float k, float* e, float* kept,
            int64_t n) {
  const Cap cap = cap_of(logit_scale, softcap);
  for (int64_t i = 0; i < n; ++i) {
    const float x = acc[i] * cap.gain;
    const Tanh tanh = tanh_and_slope_approx(bias == nullptr ? x : fmaf(bias[i], cap.bias_gain, x));
    e[i] = power_of_two(fmaf(tanh.value, cap.reach, -k));
    kept[i] = e[i] * tanh.slope;
  }
}

}  // extern "C"
