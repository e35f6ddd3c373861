// exp2_gemm's bindings. They are there in every build, so that how a problem is cut can be asked anywhere; where the
// kernels were left out, the call says so.
#include "bindings_exp2_gemm.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <stdexcept>

#include "../kernels/cuda/exp2_gemm.h"
#include "checks.h"
#if defined(MMRLHF_CUDA_ARCHS)
#include "device_guard.h"
#endif

namespace mmrlhf {
namespace {

constexpr nb::dlpack::dtype kBfloat16{static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat), 16, 1};

int tile_named(const std::string& asked, int64_t rows, int64_t vocab, int multiprocessors) {
  if (asked == "auto") return cuda::pick_gemm_tile(rows, vocab, multiprocessors);
  const int tile = cuda::gemm_tile_named(asked.c_str());
  if (tile >= 0) return tile;
  std::string allowed = "auto";
  for (const auto& each : cuda::kGemmTiles) allowed += std::string(", ") + each.name;
  throw nb::value_error(("tile must be one of " + allowed + ", got '" + asked + "'").c_str());
}

nb::dict exp2_gemm_sm90_plan(int64_t rows, int64_t vocab, int multiprocessors, const std::string& tile) {
  if (rows < 0) throw nb::value_error(("rows must not be negative, got " + std::to_string(rows)).c_str());
  if (vocab < 1) throw nb::value_error(("vocab must be positive, got " + std::to_string(vocab)).c_str());
  if (multiprocessors < 2) {
    throw nb::value_error(("multiprocessors must be at least 2, got " + std::to_string(multiprocessors)).c_str());
  }
  const cuda::GemmPlan plan = cuda::plan_exp2_gemm(rows, vocab, tile_named(tile, rows, vocab, multiprocessors));
  nb::dict result;
  result["tile"] = cuda::kGemmTiles[plan.tile].name;
  result["tiles"] = plan.tiles;
  result["padded_rows"] = plan.padded_rows;
  result["row_step"] = plan.row_step;
  result["swizzle"] = plan.swizzle;
  return result;
}

// [rows, cols] bfloat16 with contiguous columns. Returns the row stride in elements; that of one row is made up.
int64_t check_matrix(const char* name, const Array& array, int64_t rows, int64_t cols, int device_id) {
  check_kind(name, array, kBfloat16, nb::device::cuda::value, device_id);
  if (array.ndim() != 2 || (rows >= 0 && static_cast<int64_t>(array.shape(0)) != rows) ||
      (cols >= 0 && static_cast<int64_t>(array.shape(1)) != cols)) {
    const auto size = [](int64_t wanted) { return wanted < 0 ? std::string("any") : std::to_string(wanted); };
    throw nb::value_error((std::string(name) + " must have shape [" + size(rows) + ", " + size(cols) + "], got " +
                           shape_of(array))
                              .c_str());
  }
  if (array.shape(1) > 1 && array.stride(1) != 1) {
    throw nb::value_error((std::string(name) + " must have contiguous columns (stride 1), got column stride " +
                           std::to_string(array.stride(1)))
                              .c_str());
  }
  return array.shape(0) > 1 ? array.stride(0) : (static_cast<int64_t>(array.shape(1)) + 7) / 8 * 8;
}

void exp2_gemm_sm90_(const Array& hidden, const Array& weight, const std::optional<Array>& out, const Array& target,
                     const Array& offset, const Array& partial, const std::optional<Array>& bias, double logit_scale,
                     double softcap, const std::string& tile, uintptr_t stream) {
  const int device = hidden.device_id();
  cuda::Exp2Gemm a{};
  a.hidden_stride = check_matrix("hidden", hidden, -1, -1, device);
  a.rows = static_cast<int64_t>(hidden.shape(0));
  a.width = static_cast<int64_t>(hidden.shape(1));
  a.weight_stride = check_matrix("weight", weight, -1, a.width, device);
  a.vocab = static_cast<int64_t>(weight.shape(0));
  if (out) a.out_stride = check_matrix("out", *out, a.rows, a.vocab, device);
  a.hidden = hidden.data();
  a.weight = weight.data();
  a.out = out ? out->data() : nullptr;
  a.target = check_rows<int64_t>("target", target, a.rows, nb::device::cuda::value, device);
  a.offset = check_rows<float>("offset", offset, a.rows, nb::device::cuda::value, device);
  if (bias) a.bias = check_rows<float>("bias", *bias, a.vocab, nb::device::cuda::value, device);
  a.logit_scale = logit_scale;
  a.softcap = softcap;
  a.device = device;
  a.stream = reinterpret_cast<cudaStream_t>(stream);
  check_tile("partial", partial, nb::device::cuda::value);
  check_kind("partial", partial, nb::dtype<float>(), nb::device::cuda::value, device);
  a.partial = static_cast<float*>(partial.data());

#if defined(MMRLHF_CUDA_ARCHS)
  const char* op = "exp2_gemm_sm90_";
  throw_on_error(op, cudaDeviceGetAttribute(&a.multiprocessors, cudaDevAttrMultiProcessorCount, device));
  a.tile = tile_named(tile, a.rows, a.vocab, a.multiprocessors);
  const cuda::GemmPlan plan = cuda::plan_exp2_gemm(a.rows, a.vocab, a.tile);
  const bool contiguous = partial.shape(0) < 2 || partial.stride(0) == plan.padded_rows;
  if (static_cast<int64_t>(partial.shape(0)) != plan.tiles ||
      static_cast<int64_t>(partial.shape(1)) != plan.padded_rows || !contiguous) {
    throw nb::value_error(("partial must be contiguous [" + std::to_string(plan.tiles) + ", " +
                           std::to_string(plan.padded_rows) + "] for tile " + cuda::kGemmTiles[a.tile].name + ", got " +
                           shape_of(partial))
                              .c_str());
  }
  if (const char* why = cuda::refuse(a)) throw nb::value_error((std::string(op) + " cannot take this: " + why).c_str());
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
