// CUDA half of the bindings: the device is set for the call and restored, an error becomes a RuntimeError.
#include "bindings_cuda.h"

#include <nanobind/stl/optional.h>

#include "../kernels/cuda/launch.h"
#include "checks.h"
#include "device_guard.h"
#include "preference.h"

namespace mmrlhf {
namespace {

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

// Of one call's arguments, which are all to be on one device.
struct Checks {
  int device;

  Matrix matrix(const char* name, const Array& array) const { return {name, array, Matrix::either, kCuda, device}; }
  Matrix floats(const char* name, const Array& array) const { return {name, array, Matrix::float32, kCuda, device}; }

  template <typename T>
  T* array(const char* name, const Array& array, std::initializer_list<int64_t> shape) const {
    return check_array<T>(name, array, shape, kCuda, device);
  }
  template <typename T>
  T* optional(const char* name, const std::optional<Array>& array, std::initializer_list<int64_t> shape) const {
    return check_optional<T>(name, array, shape, kCuda, device);
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
  const Checks on{hidden.device_id()};
  const Matrix h = on.matrix("hidden", hidden), w = on.matrix("weight", weight);
  w.want("weight", w.rows, h.cols);
  if (h.half != w.half) throw nb::type_error("hidden and weight must have one dtype");
  if ((softcap > 0.0) != slope_y.has_value()) throw nb::value_error("slope_y goes with a softcap above 0");
  cuda::TargetLogit a{};
  a.hidden = h.data;
  a.weight = w.data;
  a.bias = on.optional<float>("bias", bias, {w.rows});
  a.target = on.array<int64_t>("target", target, {h.rows});
  a.z_y = on.array<float>("z_y", z_y, {h.rows});
  a.slope_y = on.optional<float>("slope_y", slope_y, {h.rows});
  a.offset = on.array<float>("offset", offset, {h.rows});
  a.rows = h.rows, a.vocab = w.rows, a.width = h.cols;
  a.hidden_stride = h.stride, a.weight_stride = w.stride;
  a.logit_scale = static_cast<float>(logit_scale), a.softcap = static_cast<float>(softcap);
  a.half = h.half;
  launch("target_logit_cuda", cuda::target_logit, a, on.device, stream);
}

void exp2_epilogue_cuda(const Array& tile, const Optional& out, const Array& target, const Array& offset,
                        const Array& partial, int64_t start, const Optional& bias, double logit_scale, double softcap,
                        uintptr_t stream) {
  const Checks on{tile.device_id()};
  const Matrix t = on.floats("tile", tile), p = on.floats("partial", partial);
  p.want("partial", cuda::exp2_epilogue_tiles(t.cols), t.rows);
  cuda::Exp2Epilogue a{};
  if (out) {
    const Matrix o = on.matrix("out", *out);
    o.want("out", t.rows, t.cols);
    a.out = o.data, a.out_stride = o.stride, a.half = o.half;
  }
  a.tile = t.floats();
  a.bias = on.optional<float>("bias", bias, {t.cols});
  a.offset = on.array<float>("offset", offset, {t.rows});
  a.target = on.array<int64_t>("target", target, {t.rows});
  a.partial = p.floats();
  a.rows = t.rows, a.columns = t.cols, a.start = start, a.stride = t.stride, a.partial_stride = p.stride;
  a.logit_scale = static_cast<float>(logit_scale), a.softcap = static_cast<float>(softcap);
  launch("exp2_epilogue_cuda", cuda::exp2_epilogue, a, on.device, stream);
}

// Places first ... first + capacity of the chosen rows; `rows` is how many there are to choose from.
cuda::Chosen chosen_of(const Checks& on, const Array& index, const Array& count, int64_t first, int64_t capacity,
                       int64_t rows) {
  if (first < 0 || capacity < 0 || capacity > rows - first) {
    throw value_error("first and capacity must lie within the " + std::to_string(rows) + " rows, got " +
                      std::to_string(first) + " and " + std::to_string(capacity));
  }
  return {on.array<int32_t>("index", index, {rows}), on.array<int32_t>("count", count, {1}), first, capacity};
}

void finish_cuda(const Array& partial, const Array& z_y, const Array& offset, const Array& rest, const Array& logp,
                 const Optional& index, const Optional& count, int64_t first, uintptr_t stream) {
  const Checks on{partial.device_id()};
  const Matrix p = on.floats("partial", partial);
  cuda::Finish a{};
  if (index.has_value() != count.has_value()) throw nb::value_error("index goes with count");
  const int64_t rows = index && z_y.ndim() == 1 ? static_cast<int64_t>(z_y.shape(0)) : p.cols;
  a.partial = p.floats();
  a.z_y = on.array<float>("z_y", z_y, {rows});
  a.offset = on.array<float>("offset", offset, {rows});
  a.rest = on.array<float>("rest", rest, {rows});
  a.logp = on.array<float>("logp", logp, {rows});
  if (index) a.chosen = chosen_of(on, *index, *count, first, p.cols, rows);
  a.rows = p.cols, a.tiles = p.rows, a.stride = p.stride;
  launch("finish_cuda", cuda::finish, a, on.device, stream);
}

// What dlogp/dh of a row needs of it, for UnitGradient and RedoUnit.
template <typename Arguments>
void set_rows(Arguments& a, const Checks& on, int64_t rows, const Array& target, const Array& z_y, const Array& offset,
              const Array& rest, const Optional& slope_y) {
  a.target = on.array<int64_t>("target", target, {rows});
  a.z_y = on.array<float>("z_y", z_y, {rows});
  a.offset = on.array<float>("offset", offset, {rows});
  a.rest = on.array<float>("rest", rest, {rows});
  a.slope_y = on.optional<float>("slope_y", slope_y, {rows});
}

void unit_gradient_cuda(const Array& product, const Array& weight, const Array& target, const Array& z_y,
                        const Array& offset, const Array& rest, const Optional& slope_y, double logit_scale,
                        uintptr_t stream) {
  const Checks on{product.device_id()};
  const Matrix p = on.floats("product", product), w = on.matrix("weight", weight);
  w.want("weight", w.rows, p.cols);
  cuda::UnitGradient a{};
  a.product = p.floats();
  a.weight = w.data;
  set_rows(a, on, p.rows, target, z_y, offset, rest, slope_y);
  a.rows = p.rows, a.vocab = w.rows, a.width = p.cols, a.stride = p.stride, a.weight_stride = w.stride;
  a.logit_scale = static_cast<float>(logit_scale);
  a.half = w.half;
  launch("unit_gradient_cuda", cuda::unit_gradient, a, on.device, stream);
}

void select_cuda(const Array& rest, const Array& z_y, const Array& offset, const Array& index, const Array& count,
                 bool done, uintptr_t stream) {
  const Checks on{rest.device_id()};
  cuda::Select a{};
  a.rows = rest.ndim() == 1 ? static_cast<int64_t>(rest.shape(0)) : 0;
  a.rest = on.array<float>("rest", rest, {a.rows});
  a.z_y = on.array<float>("z_y", z_y, {a.rows});
  a.offset = on.array<float>("offset", offset, {a.rows});
  a.index = on.array<int32_t>("index", index, {a.rows});
  a.count = on.array<int32_t>("count", count, {1});
  a.done = done;
  launch("select_cuda", cuda::select, a, on.device, stream);
}

// What both passes over the chosen rows take.
cuda::Redo redo_of(const Checks& on, const Array& hidden, const Array& weight, const Array& target, const Array& offset,
                   const Array& index, const Array& count, int64_t first, int64_t capacity, const Optional& bias,
                   const Optional& low, const Optional& up, double logit_scale, double softcap) {
  const Matrix h = on.matrix("hidden", hidden), w = on.matrix("weight", weight);
  w.want("weight", w.rows, h.cols);
  if (h.half != w.half) throw nb::type_error("hidden and weight must have one dtype");
  if (low.has_value() != up.has_value()) throw nb::value_error("low goes with up");
  cuda::Redo a{};
  if (low) {
    const Matrix l = on.floats("low", *low), u = on.floats("up", *up);
    l.want("low", h.rows, l.cols);
    u.want("up", w.rows, l.cols);
    a.low = l.floats(), a.up = u.floats();
    a.rank = l.cols, a.low_stride = l.stride, a.up_stride = u.stride;
  }
  a.hidden = h.data, a.weight = w.data;
  a.bias = on.optional<float>("bias", bias, {w.rows});
  a.target = on.array<int64_t>("target", target, {h.rows});
  a.offset = on.array<float>("offset", offset, {h.rows});
  a.columns = w.rows, a.width = h.cols, a.hidden_stride = h.stride, a.weight_stride = w.stride;
  a.chosen = chosen_of(on, index, count, first, capacity, h.rows);
  a.logit_scale = static_cast<float>(logit_scale), a.softcap = static_cast<float>(softcap);
  a.half = h.half;
  return a;
}

void set_partial(cuda::Redo& a, const Checks& on, const Array& partial) {
  const Matrix p = on.floats("partial", partial);
  p.want("partial", cuda::redo_tiles(a.columns), a.chosen.capacity);
  a.partial = p.floats(), a.partial_stride = p.stride;
}

void redo_maximum_cuda(const Array& hidden, const Array& weight, const Array& target, const Array& offset,
                       const Array& index, const Array& count, const Array& partial, int64_t first, int64_t capacity,
                       const Optional& bias, const Optional& low, const Optional& up, double logit_scale,
                       double softcap, uintptr_t stream) {
  const Checks on{hidden.device_id()};
  cuda::Redo a = redo_of(on, hidden, weight, target, offset, index, count, first, capacity, bias, low, up, logit_scale,
                         softcap);
  set_partial(a, on, partial);
  launch("redo_maximum_cuda", cuda::redo_maximum, a, on.device, stream);
}

void redo_exponentials_cuda(const Array& hidden, const Array& weight, const Optional& out, const Array& target,
                            const Array& offset, const Array& index, const Array& count, const Optional& partial,
                            int64_t first, int64_t capacity, int64_t start, bool by_row, const Optional& bias,
                            const Optional& low, const Optional& up, double logit_scale, double softcap,
                            uintptr_t stream) {
  const Checks on{hidden.device_id()};
  cuda::Redo a = redo_of(on, hidden, weight, target, offset, index, count, first, capacity, bias, low, up, logit_scale,
                         softcap);
  if (out) {
    const Matrix o = on.matrix("out", *out);
    if (o.half != a.half) throw nb::type_error("out must have the dtype of hidden and weight");
    o.want("out", by_row ? static_cast<int64_t>(hidden.shape(0)) : capacity, a.columns);
    a.out = o.data, a.out_stride = o.stride;
  }
  if (partial) set_partial(a, on, *partial);
  a.start = start, a.by_row = by_row;
  launch("redo_exponentials_cuda", cuda::redo_exponentials, a, on.device, stream);
}

void redo_unit_cuda(const Array& unit, const Array& exponentials, const Array& weight, const Array& target,
                    const Array& z_y, const Array& offset, const Array& rest, const Array& index, const Array& count,
                    int64_t first, int64_t capacity, bool by_row, const Optional& slope_y, double logit_scale,
                    uintptr_t stream) {
  const Checks on{unit.device_id()};
  const Matrix u = on.floats("unit", unit), e = on.matrix("exponentials", exponentials), w = on.matrix("weight", weight);
  if (w.half && !e.half) throw nb::type_error("float32 exponentials need a float32 weight, got bfloat16");
  w.want("weight", w.rows, u.cols);
  e.want("exponentials", by_row ? u.rows : capacity, w.rows);
  cuda::RedoUnit a{};
  a.exponentials = e.data, a.weight = w.data, a.unit = u.floats();
  set_rows(a, on, u.rows, target, z_y, offset, rest, slope_y);
  a.vocab = w.rows, a.width = u.cols, a.e_stride = e.stride, a.weight_stride = w.stride, a.unit_stride = u.stride;
  a.chosen = chosen_of(on, index, count, first, capacity, u.rows);
  a.logit_scale = static_cast<float>(logit_scale);
  a.half_e = e.half, a.half_weight = w.half, a.by_row = by_row;
  launch("redo_unit_cuda", cuda::redo_unit, a, on.device, stream);
}

// [kStatistics, tiles, rows] float32, rows side by side, tiles and statistics apart.
float* check_statistics(const Checks& on, const Array& partial, int64_t tiles, int64_t rows) {
  check_kind("partial", partial, nb::dtype<float>(), kCuda, on.device);
  const bool shaped = partial.ndim() == 3 && partial.shape(0) == cuda::kStatistics &&
                      static_cast<int64_t>(partial.shape(1)) == tiles && static_cast<int64_t>(partial.shape(2)) == rows;
  const bool some = shaped && tiles > 0 && rows > 0;  // else strides mean nothing
  if (!shaped || (some && ((rows > 1 && partial.stride(2) != 1) || (tiles > 1 && partial.stride(1) < rows) ||
                           partial.stride(0) < (tiles > 1 ? (tiles - 1) * partial.stride(1) : 0) + rows))) {
    throw value_error("partial must have shape " + shape_of({cuda::kStatistics, tiles, rows}) +
                      ", its rows side by side and nothing twice, got " + shape_of(partial));
  }
  return static_cast<float*>(partial.data());
}

void token_statistics_cuda(const Array& tile, const Array& target, const Array& z_y, const Array& partial,
                           int64_t start, const Optional& bias, double logit_scale, double softcap, uintptr_t stream) {
  const Checks on{tile.device_id()};
  const Matrix t = on.floats("tile", tile);
  cuda::TokenStatistics a{};
  a.tile = t.floats();
  a.bias = on.optional<float>("bias", bias, {t.cols});
  a.target = on.array<int64_t>("target", target, {t.rows});
  a.z_y = on.array<float>("z_y", z_y, {t.rows});
  a.partial = check_statistics(on, partial, cuda::exp2_epilogue_tiles(t.cols), t.rows);
  a.rows = t.rows, a.columns = t.cols, a.start = start, a.stride = t.stride;
  a.statistic_stride = partial.stride(0), a.partial_stride = partial.stride(1);
  a.logit_scale = static_cast<float>(logit_scale), a.softcap = static_cast<float>(softcap);
  launch("token_statistics_cuda", cuda::token_statistics, a, on.device, stream);
}

void finish_statistics_cuda(const Array& partial, const Array& z_y, const Array& logp, const Array& entropy,
                            const Array& sum_p2, const Array& mean_logit, const Array& is_top1, int64_t vocab,
                            uintptr_t stream) {
  const Checks on{partial.device_id()};
  const int64_t rows = z_y.ndim() == 1 ? static_cast<int64_t>(z_y.shape(0)) : 0;
  cuda::FinishStatistics a{};
  a.tiles = partial.ndim() == 3 ? static_cast<int64_t>(partial.shape(1)) : 0;
  a.partial = check_statistics(on, partial, a.tiles, rows);
  a.z_y = on.array<float>("z_y", z_y, {rows});
  a.logp = on.array<float>("logp", logp, {rows});
  a.entropy = on.array<float>("entropy", entropy, {rows});
  a.sum_p2 = on.array<float>("sum_p2", sum_p2, {rows});
  a.mean_logit = on.array<float>("mean_logit", mean_logit, {rows});
  a.is_top1 = on.array<int8_t>("is_top1", is_top1, {rows});
  a.rows = rows, a.vocab = vocab, a.statistic_stride = partial.stride(0), a.partial_stride = partial.stride(1);
  launch("finish_statistics_cuda", cuda::finish_statistics, a, on.device, stream);
}

void preference_cuda(const PreferenceArguments& checked, int64_t, int device, const Array& scratch,
                     const Optional& num_pairs, const Optional& num_sft_tokens, uintptr_t stream) {
  const Checks on{device};
  PreferenceArguments a = checked;
  a.scratch = on.array<double>("scratch", scratch, {3 * a.responses + 2 * a.count});
  a.num_pairs = on.optional<double>("num_pairs_tensor", num_pairs, {});
  a.num_sft_tokens = on.optional<double>("num_sft_tokens_tensor", num_sft_tokens, {});
  launch("preference_cuda", cuda::preference, a, on.device, stream);
}

void bind_redo(nb::module_& m) {
  using namespace nb::literals;
  m.def("select_cuda", &select_cuda, "rest"_a.noconvert(), "z_y"_a.noconvert(), "offset"_a.noconvert(),
        "index"_a.noconvert(), "count"_a.noconvert(), nb::kw_only(), "done"_a = false, "stream"_a);
  m.def("redo_maximum_cuda", &redo_maximum_cuda, "hidden"_a.noconvert(), "weight"_a.noconvert(),
        "target"_a.noconvert(), "offset"_a.noconvert(), "index"_a.noconvert(), "count"_a.noconvert(),
        "partial"_a.noconvert(), nb::kw_only(), "first"_a, "capacity"_a, "bias"_a.noconvert() = nb::none(),
        "low"_a.noconvert() = nb::none(), "up"_a.noconvert() = nb::none(), "logit_scale"_a = 1.0, "softcap"_a = 0.0,
        "stream"_a);
  m.def("redo_exponentials_cuda", &redo_exponentials_cuda, "hidden"_a.noconvert(), "weight"_a.noconvert(),
        "out"_a.noconvert().none(), "target"_a.noconvert(), "offset"_a.noconvert(), "index"_a.noconvert(),
        "count"_a.noconvert(), "partial"_a.noconvert().none(), nb::kw_only(), "first"_a, "capacity"_a, "start"_a = 0,
        "by_row"_a = false, "bias"_a.noconvert() = nb::none(), "low"_a.noconvert() = nb::none(),
        "up"_a.noconvert() = nb::none(), "logit_scale"_a = 1.0, "softcap"_a = 0.0, "stream"_a);
  m.def("redo_unit_cuda", &redo_unit_cuda, "unit"_a.noconvert(), "exponentials"_a.noconvert(), "weight"_a.noconvert(),
        "target"_a.noconvert(), "z_y"_a.noconvert(), "offset"_a.noconvert(), "rest"_a.noconvert(),
        "index"_a.noconvert(), "count"_a.noconvert(), nb::kw_only(), "first"_a, "capacity"_a, "by_row"_a = false,
        "slope_y"_a.noconvert() = nb::none(), "logit_scale"_a = 1.0, "stream"_a);
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
        "rest"_a.noconvert(), "logp"_a.noconvert(), nb::kw_only(), "index"_a.noconvert() = nb::none(),
        "count"_a.noconvert() = nb::none(), "first"_a = 0, "stream"_a);
  m.def("unit_gradient_cuda", &unit_gradient_cuda, "product"_a.noconvert(), "weight"_a.noconvert(),
        "target"_a.noconvert(), "z_y"_a.noconvert(), "offset"_a.noconvert(), "rest"_a.noconvert(), nb::kw_only(),
        "slope_y"_a.noconvert() = nb::none(), "logit_scale"_a = 1.0, "stream"_a);
  bind_redo(m);
  m.def("token_statistics_cuda", &token_statistics_cuda, "tile"_a.noconvert(), "target"_a.noconvert(),
        "z_y"_a.noconvert(), "partial"_a.noconvert(), nb::kw_only(), "start"_a, "bias"_a.noconvert() = nb::none(),
        "logit_scale"_a = 1.0, "softcap"_a = 0.0, "stream"_a);
  m.def("finish_statistics_cuda", &finish_statistics_cuda, "partial"_a.noconvert(), "z_y"_a.noconvert(),
        "logp"_a.noconvert(), "entropy"_a.noconvert(), "sum_p2"_a.noconvert(), "mean_logit"_a.noconvert(),
        "is_top1"_a.noconvert(), nb::kw_only(), "vocab"_a, "stream"_a);
  def_preference(m, "preference_cuda", kCuda, &preference_cuda, "scratch"_a.noconvert(),
                 "num_pairs_tensor"_a.noconvert() = nb::none(), "num_sft_tokens_tensor"_a.noconvert() = nb::none(),
                 "stream"_a);
  m.def("exp2_rowsum_cuda", &exp2_rowsum_cuda, "tile"_a.noconvert(), "offset"_a.noconvert(), "sums"_a.noconvert(),
        nb::kw_only(), "target_col"_a.noconvert() = nb::none(), "target_exp"_a.noconvert() = nb::none(),
        "accumulate"_a = false, "stream"_a);
}

}  // namespace mmrlhf
