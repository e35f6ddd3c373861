// CUDA half of the bindings: the device is set for the call and restored, an error becomes a RuntimeError.
#include "bindings_cuda.h"

#include <nanobind/stl/optional.h>

#include "../kernels/cuda/launch.h"
#include "checks.h"
#include "device_guard.h"
#include "preference.h"

namespace mmrlhf {
namespace {

#if defined(MMRLHF_EMULATE)  // tests/csrc: the kernels compiled as host code
constexpr int kCuda = nb::device::cpu::value;
#else
constexpr int kCuda = nb::device::cuda::value;
#endif

void exp2_rowsum_cuda(const Array& tile, const Array& offset, const Array& sums, const std::optional<Array>& target_col,
                      const std::optional<Array>& target_exp, bool accumulate, uintptr_t stream) {
  const Exp2RowsumArguments a(tile, offset, sums, target_col, target_exp, kCuda);
  const int device = tile.device_id();
  nb::gil_scoped_release unlocked;
  const DeviceGuard guard(device);
  throw_on_error("exp2_rowsum_cuda",
                 cuda::exp2_rowsum(a.tile, a.offset, a.sums, a.target_col, a.target_exp, a.rows, a.cols, a.stride,
                                   accumulate, reinterpret_cast<cudaStream_t>(stream)));
}

constexpr nb::dlpack::dtype kBfloat16{static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat), 16, 1};

// [rows, cols] float32 or bfloat16, columns contiguous.
struct Matrix {
  void* data;
  int64_t rows, cols, stride;
  bool half;

  Matrix(const char* name, const Array& array, int device) : data(array.data()), half(array.dtype() == kBfloat16) {
    check_kind(name, array, half ? kBfloat16 : nb::dtype<float>(), kCuda, device);
    if (array.ndim() != 2) {
      throw nb::value_error((std::string(name) + " must be [rows, cols], got shape " + shape_of(array)).c_str());
    }
    rows = static_cast<int64_t>(array.shape(0));
    cols = static_cast<int64_t>(array.shape(1));
    stride = rows > 1 && cols > 0 ? array.stride(0) : cols;
    if (rows > 0 && ((cols > 1 && array.stride(1) != 1) || (cols > 0 && stride < cols))) {
      throw nb::value_error((std::string(name) + " must have contiguous columns, and rows that do not overlap").c_str());
    }
  }

  void want(const char* name, int64_t rows_, int64_t cols_) const {
    if (rows == rows_ && cols == cols_) return;
    throw nb::value_error((std::string(name) + " must have shape [" + std::to_string(rows_) + ", " +
                           std::to_string(cols_) + "], got [" + std::to_string(rows) + ", " + std::to_string(cols) + "]")
                              .c_str());
  }
};

template <typename Arguments, typename Launcher>
void launch(const char* op, Launcher* launcher, const Arguments& arguments, int device, uintptr_t stream) {
  nb::gil_scoped_release unlocked;
  const DeviceGuard guard(device);
  throw_on_error(op, launcher(arguments, reinterpret_cast<cudaStream_t>(stream)));
}

using Optional = std::optional<Array>;

void target_logit_cuda(const Array& hidden, const Array& weight, const Array& target, const Array& z_y,
                       const Array& offset, const Optional& bias, const Optional& slope_y, double logit_scale,
                       double softcap, uintptr_t stream) {
  const int device = hidden.device_id();
  const Matrix h("hidden", hidden, device), w("weight", weight, device);
  w.want("weight", w.rows, h.cols);
  if (h.half != w.half) throw nb::type_error("hidden and weight must have one dtype");
  if ((softcap > 0.0) != slope_y.has_value()) throw nb::value_error("slope_y goes with a softcap above 0");
  cuda::TargetLogit a{};
  a.hidden = h.data;
  a.weight = w.data;
  a.bias = check_optional<float>("bias", bias, {w.rows}, kCuda, device);
  a.target = check_array<int64_t>("target", target, {h.rows}, kCuda, device);
  a.z_y = check_array<float>("z_y", z_y, {h.rows}, kCuda, device);
  a.slope_y = check_optional<float>("slope_y", slope_y, {h.rows}, kCuda, device);
  a.offset = check_array<float>("offset", offset, {h.rows}, kCuda, device);
  a.rows = h.rows, a.vocab = w.rows, a.width = h.cols;
  a.hidden_stride = h.stride, a.weight_stride = w.stride;
  a.logit_scale = static_cast<float>(logit_scale), a.softcap = static_cast<float>(softcap);
  a.half = h.half;
  launch("target_logit_cuda", cuda::target_logit, a, device, stream);
}

void exp2_epilogue_cuda(const Array& tile, const Optional& out, const Array& target, const Array& offset,
                        const Array& partial, int64_t start, const Optional& bias, double logit_scale, double softcap,
                        uintptr_t stream) {
  const int device = tile.device_id();
  const Matrix t("tile", tile, device), p("partial", partial, device);
  if (t.half) throw nb::type_error("tile must be float32, got bfloat16");
  if (p.half) throw nb::type_error("partial must be float32, got bfloat16");
  p.want("partial", cuda::exp2_epilogue_tiles(t.cols), t.rows);
  cuda::Exp2Epilogue a{};
  if (out) {
    const Matrix o("out", *out, device);
    o.want("out", t.rows, t.cols);
    a.out = o.data, a.out_stride = o.stride, a.half = o.half;
  }
  a.tile = static_cast<const float*>(t.data);
  a.bias = check_optional<float>("bias", bias, {t.cols}, kCuda, device);
  a.offset = check_array<float>("offset", offset, {t.rows}, kCuda, device);
  a.target = check_array<int64_t>("target", target, {t.rows}, kCuda, device);
  a.partial = static_cast<float*>(p.data);
  a.rows = t.rows, a.columns = t.cols, a.start = start, a.stride = t.stride, a.partial_stride = p.stride;
  a.logit_scale = static_cast<float>(logit_scale), a.softcap = static_cast<float>(softcap);
  launch("exp2_epilogue_cuda", cuda::exp2_epilogue, a, device, stream);
}

void finish_cuda(const Array& partial, const Array& z_y, const Array& offset, const Array& rest, const Array& logp,
                 uintptr_t stream) {
  const int device = partial.device_id();
  const Matrix p("partial", partial, device);
  if (p.half) throw nb::type_error("partial must be float32, got bfloat16");
  cuda::Finish a{};
  a.partial = static_cast<const float*>(p.data);
  a.z_y = check_array<float>("z_y", z_y, {p.cols}, kCuda, device);
  a.offset = check_array<float>("offset", offset, {p.cols}, kCuda, device);
  a.rest = check_array<float>("rest", rest, {p.cols}, kCuda, device);
  a.logp = check_array<float>("logp", logp, {p.cols}, kCuda, device);
  a.rows = p.cols, a.tiles = p.rows, a.stride = p.stride;
  launch("finish_cuda", cuda::finish, a, device, stream);
}

void unit_gradient_cuda(const Array& product, const Array& weight, const Array& target, const Array& z_y,
                        const Array& offset, const Array& rest, const Optional& slope_y, double logit_scale,
                        uintptr_t stream) {
  const int device = product.device_id();
  const Matrix p("product", product, device), w("weight", weight, device);
  if (p.half) throw nb::type_error("product must be float32, got bfloat16");
  w.want("weight", w.rows, p.cols);
  cuda::UnitGradient a{};
  a.product = static_cast<float*>(p.data);
  a.weight = w.data;
  a.target = check_array<int64_t>("target", target, {p.rows}, kCuda, device);
  a.z_y = check_array<float>("z_y", z_y, {p.rows}, kCuda, device);
  a.offset = check_array<float>("offset", offset, {p.rows}, kCuda, device);
  a.rest = check_array<float>("rest", rest, {p.rows}, kCuda, device);
  a.slope_y = check_optional<float>("slope_y", slope_y, {p.rows}, kCuda, device);
  a.rows = p.rows, a.vocab = w.rows, a.width = p.cols, a.stride = p.stride, a.weight_stride = w.stride;
  a.logit_scale = static_cast<float>(logit_scale);
  a.half = w.half;
  launch("unit_gradient_cuda", cuda::unit_gradient, a, device, stream);
}

void preference_cuda(const PreferenceArguments& checked, int64_t, int device, const Array& scratch,
                     const Optional& num_pairs, const Optional& num_sft_tokens, uintptr_t stream) {
  PreferenceArguments a = checked;
  a.scratch = check_array<double>("scratch", scratch, {3 * a.responses + 2 * a.count}, kCuda, device);
  a.num_pairs = check_optional<double>("num_pairs_tensor", num_pairs, {}, kCuda, device);
  a.num_sft_tokens = check_optional<double>("num_sft_tokens_tensor", num_sft_tokens, {}, kCuda, device);
  launch("preference_cuda", cuda::preference, a, device, stream);
}

}  // namespace

void bind_cuda(nb::module_& m) {
  using namespace nb::literals;
  m.def("target_logit_cuda", &target_logit_cuda, "hidden"_a.noconvert(), "weight"_a.noconvert(),
        "target"_a.noconvert(), "z_y"_a.noconvert(), "offset"_a.noconvert(), nb::kw_only(),
        "bias"_a.noconvert() = nb::none(), "slope_y"_a.noconvert() = nb::none(), "logit_scale"_a = 1.0,
        "softcap"_a = 0.0, "stream"_a);
  m.def("exp2_epilogue_cuda", &exp2_epilogue_cuda, "tile"_a.noconvert(), "out"_a.noconvert().none(),
        "target"_a.noconvert(), "offset"_a.noconvert(), "partial"_a.noconvert(), nb::kw_only(), "start"_a,
        "bias"_a.noconvert() = nb::none(), "logit_scale"_a = 1.0, "softcap"_a = 0.0, "stream"_a);
  m.def("finish_cuda", &finish_cuda, "partial"_a.noconvert(), "z_y"_a.noconvert(), "offset"_a.noconvert(),
        "rest"_a.noconvert(), "logp"_a.noconvert(), nb::kw_only(), "stream"_a);
  m.def("unit_gradient_cuda", &unit_gradient_cuda, "product"_a.noconvert(), "weight"_a.noconvert(),
        "target"_a.noconvert(), "z_y"_a.noconvert(), "offset"_a.noconvert(), "rest"_a.noconvert(), nb::kw_only(),
        "slope_y"_a.noconvert() = nb::none(), "logit_scale"_a = 1.0, "stream"_a);
  def_preference(m, "preference_cuda", kCuda, &preference_cuda, "scratch"_a.noconvert(),
                 "num_pairs_tensor"_a.noconvert() = nb::none(), "num_sft_tokens_tensor"_a.noconvert() = nb::none(),
                 "stream"_a);
  m.def("exp2_rowsum_cuda", &exp2_rowsum_cuda, "tile"_a.noconvert(), "offset"_a.noconvert(), "sums"_a.noconvert(),
        nb::kw_only(), "target_col"_a.noconvert() = nb::none(), "target_exp"_a.noconvert() = nb::none(),
        "accumulate"_a = false, "stream"_a);
}

}  // namespace mmrlhf
