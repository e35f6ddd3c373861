// exp2_gemm's bindings. They are there in every build, so that how a problem is cut can be asked anywhere; where the
// kernels were left out, the call says so.
#include "bindings_exp2_gemm.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <stdexcept>

#include "../kernels/cuda/exp2_gemm.h"
#include "checks.h"
#if defined(MMRLHF_CUDA_ARCHS)
#include "device_guard.h"
#endif

namespace mmrlhf {
namespace {

int tile_named(const std::string& asked, int64_t rows, int64_t vocab, int multiprocessors) {
  if (asked == "auto") return cuda::pick_gemm_tile(rows, vocab, multiprocessors);
  const int tile = cuda::gemm_tile_named(asked.c_str());
  if (tile >= 0) return tile;
  std::string allowed = "auto";
  for (const auto& each : cuda::kGemmTiles) allowed += std::string(", ") + each.name;
  throw value_error("tile must be one of " + allowed + ", got '" + asked + "'");
}

nb::dict exp2_gemm_sm90_plan(int64_t rows, int64_t vocab, int multiprocessors, const std::string& tile) {
  if (rows < 0) throw value_error("rows must not be negative, got " + std::to_string(rows));
  if (vocab < 1) throw value_error("vocab must be positive, got " + std::to_string(vocab));
  check_least("multiprocessors", multiprocessors, 2);
  const cuda::GemmPlan plan = cuda::plan_exp2_gemm(rows, vocab, tile_named(tile, rows, vocab, multiprocessors));
  nb::dict result;
  result["tile"] = cuda::kGemmTiles[plan.tile].name;
  result["tiles"] = plan.tiles;
  result["padded_rows"] = plan.padded_rows;
  result["row_step"] = plan.row_step;
  result["swizzle"] = plan.swizzle;
  return result;
}

// TMA looks at a stride even where there is one row: then it is made up, and need only be a multiple of 8.
int64_t stride_of(const Matrix& matrix) { return matrix.rows > 1 ? matrix.stride : (matrix.cols + 7) / 8 * 8; }

void exp2_gemm_sm90_(const Array& hidden, const Array& weight, const std::optional<Array>& out, const Array& target,
                     const Array& offset, const Array& partial, const std::optional<Array>& bias, double logit_scale,
                     double softcap, const std::string& tile, uintptr_t stream) {
  const int device = hidden.device_id();
  const Matrix h("hidden", hidden, Matrix::bfloat16, kCuda, device);
  const Matrix w("weight", weight, Matrix::bfloat16, kCuda, device);
  w.want("weight", w.rows, h.cols);
  cuda::Exp2Gemm a{};
  a.hidden = h.data, a.weight = w.data, a.hidden_stride = stride_of(h), a.weight_stride = stride_of(w);
  a.rows = h.rows, a.vocab = w.rows, a.width = h.cols;
  if (out) {
    const Matrix o("out", *out, Matrix::bfloat16, kCuda, device);
    o.want("out", h.rows, w.rows);
    a.out = o.data, a.out_stride = stride_of(o);
  }
  a.target = check_array<int64_t>("target", target, {h.rows}, kCuda, device, ", one value a row of hidden");
  a.offset = check_array<float>("offset", offset, {h.rows}, kCuda, device, ", one value a row of hidden");
  a.bias = check_optional<float>("bias", bias, {w.rows}, kCuda, device, ", one value a row of weight");
  a.logit_scale = logit_scale;
  a.softcap = softcap;
  a.device = device;
  a.stream = reinterpret_cast<cudaStream_t>(stream);
  const Matrix p("partial", partial, Matrix::float32, kCuda, device);
  a.partial = p.floats();

#if defined(MMRLHF_CUDA_ARCHS)
  const char* op = "exp2_gemm_sm90_";
  throw_on_error(op, cudaDeviceGetAttribute(&a.multiprocessors, cudaDevAttrMultiProcessorCount, device));
  a.tile = tile_named(tile, a.rows, a.vocab, a.multiprocessors);
  const cuda::GemmPlan plan = cuda::plan_exp2_gemm(a.rows, a.vocab, a.tile);
  if (p.rows != plan.tiles || p.cols != plan.padded_rows || p.stride != plan.padded_rows) {
    throw value_error("partial must be contiguous " + shape_of({plan.tiles, plan.padded_rows}) + " for tile " +
                      cuda::kGemmTiles[a.tile].name + ", got " + shape_of(partial));
  }
  if (plan.tiles > INT32_MAX / std::max<int64_t>(plan.padded_rows, 1)) {  // CUTLASS's offsets into it have 32 bits
    throw value_error("partial " + shape_of(partial) + " has 2^31 or more entries: give fewer rows of hidden at once");
  }
  if (const char* why = cuda::refuse(a)) throw value_error(std::string(op) + " cannot take this: " + why);
  nb::gil_scoped_release unlocked;
  const DeviceGuard guard(device);
  const cuda::GemmStatus status = cuda::exp2_gemm(a);
  if (status != cuda::GemmStatus::ok) throw std::runtime_error(std::string(op) + ": " + cuda::message_of(status));
#else
  tile_named(tile, a.rows, a.vocab, 2);
  throw std::runtime_error(std::string("exp2_gemm_sm90_: ") + cuda::message_of(cuda::GemmStatus::not_built));
#endif
}

}  // namespace

const char* exp2_gemm_built() { return cuda::exp2_gemm_built(); }

void bind_exp2_gemm(nb::module_& m) {
  using namespace nb::literals;
  m.def("exp2_gemm_sm90_plan", &exp2_gemm_sm90_plan, "rows"_a, "vocab"_a, nb::kw_only(), "multiprocessors"_a,
        "tile"_a = "auto");
  m.def("exp2_gemm_sm90_", &exp2_gemm_sm90_, "hidden"_a.noconvert(), "weight"_a.noconvert(),
        "out"_a.noconvert().none(), nb::kw_only(), "target"_a.noconvert(), "offset"_a.noconvert(),
        "partial"_a.noconvert(), "bias"_a.noconvert() = nb::none(), "logit_scale"_a = 1.0, "softcap"_a = 0.0,
        "tile"_a = "auto", "stream"_a);
}

}  // namespace mmrlhf
