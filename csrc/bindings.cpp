// The extension module mmrlhf._C: argument checks, the interpreter lock, and one definition an op.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include "bindings_exp2_gemm.h"
#include "checks.h"
#include "cpu/exp2_rowsum.h"
#include "cpu/parallel.h"
#include "cpu/preference.h"
#include "preference.h"
#if defined(MMRLHF_CUDA_ARCHS)
#include "bindings_cuda.h"
#endif

namespace mmrlhf {
namespace {

using cpu::Isa;
constexpr struct {
  Isa isa;
  const char* name;
} kIsas[] = {{Isa::scalar, "scalar"}, {Isa::avx2, "avx2"}, {Isa::avx512, "avx512"}};

nb::list supported_isas() {
  nb::list names;
  for (const auto& [isa, name] : kIsas) {
    if (cpu::supported(isa)) names.append(name);
  }
  return names;
}

Isa isa_named(const std::string& asked) {
  if (asked == "auto") return cpu::best_isa();
  std::string allowed = "auto";
  for (const auto& [isa, name] : kIsas) {
    if (!cpu::supported(isa)) continue;
    if (asked == name) return isa;
    allowed += std::string(", ") + name;
  }
  throw value_error("isa must be one that this CPU has (" + allowed + "), got '" + asked + "'");
}

void exp2_rowsum_(const Array& tile, const Array& offset, const Array& sums, const std::optional<Array>& target_col,
                  const std::optional<Array>& target_exp, bool accumulate, int threads, const std::string& isa) {
  const Exp2RowsumArguments a(tile, offset, sums, target_col, target_exp, nb::device::cpu::value);
  check_least("threads", threads, 1);
  const Isa path = isa_named(isa);
  nb::gil_scoped_release unlocked;
  cpu::exp2_rowsum({a.tile, a.rows, a.cols, a.stride}, a.offset, a.sums, a.target_col, a.target_exp, accumulate, path,
                   threads);
}

void exp2_rowsum_block_(const Array& tile, const Array& offset, const Array& rest, const Array& target, int64_t start,
                        const std::optional<Array>& value, int threads, const std::string& isa) {
  const Exp2RowsumArguments a(tile, offset, rest, target, std::nullopt, nb::device::cpu::value, "rest", "target");
  const float* values =
      check_optional<float>("value", value, {a.rows}, nb::device::cpu::value, tile.device_id(), a.kARow);
  check_least("threads", threads, 1);
  check_least("start", start, 0);
  const Isa path = isa_named(isa);
  nb::gil_scoped_release unlocked;
  cpu::exp2_rowsum_block({a.tile, a.rows, a.cols, a.stride}, a.offset, a.sums, a.target_col, start, values, path,
                         threads);
}

// An index out of range would be read or written through; on the CPU looking is free.
void check_ranges(const PreferenceArguments& a, int64_t tokens) {
  if (a.end(0) != 0 || a.end(a.responses) != tokens) {
    throw value_error("cu_seqlens must run from 0 to " + std::to_string(tokens) + ", got " + std::to_string(a.end(0)) +
                      " to " + std::to_string(a.end(a.responses)));
  }
  for (int64_t r = 0; r < a.responses; ++r) {
    if (a.end(r + 1) < a.end(r)) {
      throw value_error("cu_seqlens must be in ascending order; entry " + std::to_string(r + 1) + " is " +
                        std::to_string(a.end(r + 1)));
    }
  }
  for (int64_t i = 0; i < 2 * a.count; ++i) {
    const int64_t r = PreferenceArguments::at(a.pairs, a.wide_pairs, i);
    if (r < 0 || r >= a.responses) {
      throw value_error("pairs must be responses in [0, " + std::to_string(a.responses) + "); entry " +
                        std::to_string(i) + " is " + std::to_string(r));
    }
  }
}

void preference_cpu(const PreferenceArguments& a, int64_t tokens, int) {
  check_ranges(a, tokens);
  nb::gil_scoped_release unlocked;
  cpu::preference(a);
}

nb::dict build_info() {
  nb::dict info;
  info["version"] = MMRLHF_VERSION;
  info["compiler"] = MMRLHF_COMPILER;
  info["isas"] = supported_isas();
  for (const auto& [isa, name] : kIsas) {
    if (isa == cpu::best_isa()) info["isa"] = name;
  }
  info["threads"] = threads_from();
#if defined(MMRLHF_CUDA_ARCHS)
  info["cuda"] = true;
  info["cuda_archs"] = MMRLHF_CUDA_ARCHS;
  info["cuda_compiler"] = MMRLHF_CUDA_COMPILER;
#else
  info["cuda"] = false;
  info["cuda_archs"] = "";
  info["cuda_compiler"] = "";
#endif
  info["exp2_gemm"] = exp2_gemm_built();
  return info;
}

}  // namespace
}  // namespace mmrlhf

NB_MODULE(_C, m) {
  using namespace nanobind::literals;
  namespace nb = nanobind;
  m.doc() = "Compiled ops of mmrlhf. Signatures and meaning: mmrlhf/_C.pyi.";
  m.def("exp2_rowsum_", &mmrlhf::exp2_rowsum_, "tile"_a.noconvert(), "offset"_a.noconvert(), "sums"_a.noconvert(),
        nb::kw_only(), "target_col"_a.noconvert() = nb::none(), "target_exp"_a.noconvert() = nb::none(),
        "accumulate"_a = false, "threads"_a = 1, "isa"_a = "auto");
  m.def("exp2_rowsum_block_", &mmrlhf::exp2_rowsum_block_, "tile"_a.noconvert(), "offset"_a.noconvert(),
        "rest"_a.noconvert(), "target"_a.noconvert(), nb::kw_only(), "start"_a, "value"_a.noconvert() = nb::none(),
        "threads"_a = 1, "isa"_a = "auto");
  mmrlhf::def_preference(m, "preference_", nb::device::cpu::value, &mmrlhf::preference_cpu);
  m.def("build_info", &mmrlhf::build_info);
  mmrlhf::bind_exp2_gemm(m);
#if defined(MMRLHF_CUDA_ARCHS)
  mmrlhf::bind_cuda(m);
#endif
}
