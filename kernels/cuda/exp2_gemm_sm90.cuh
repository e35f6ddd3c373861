// exp2_gemm on Hopper: CUTLASS's warp-specialised persistent GEMM (TMA loads, wgmma, TMA stores) with the exponential
// as its epilogue. One tile of logits lives in registers only; what leaves the SM is E in bfloat16 (or nothing), and
// one float32 a row and tile. Included by one .cu file a tile shape, so that they compile side by side.
//
// The epilogue is a tree of visitors (CUTLASS calls it EVT), from the root:
//   RowSums            adds what passes through over the tile's columns, and stores the sum: partial[tile, row]
//   OffsetExponential  acc -> E, with 0 in the target's column and in columns past the vocabulary; with a cap also E
//                      times its slope, which is what is stored, while E is what is summed
//   two vectors        k and the target of each row
// What CUTLASS does with rows past the last (of a tile that the matrix does not fill): their k is whatever the register
// held, TMA does not store their E, and their sums go to the padding of `partial`. Nobody reads them.
// ptxas reports C7510, "wgmma serialized", where a call stays between the wgmma: CUTLASS's asserts do that, so this has
// to be compiled with -DNDEBUG.
#pragma once

#include <cutlass/cutlass.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/collective/default_epilogue.hpp>
#include <cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "exp2_gemm.h"
#include "exp2_gemm_formula.cuh"

namespace mmrlhf::cuda::sm90 {

namespace fusion = cutlass::epilogue::fusion;
constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;

// What a capped logit becomes: E for the sums, and E times the slope of the cap for the gradient.
template <int Size>
struct Capped {
  cutlass::Array<float, Size> e, kept;
};

// The node of the tree that makes E. Its visit() sees a fragment of accumulators with the coordinates of each, relative
// to the thread's first; `residue` holds how far the matrix goes from there.
template <bool kCapped>
struct OffsetExponential {
  struct SharedStorage {};
  struct Arguments {
    cute::conditional_t<kCapped, Cap, Gain> gain;
    const float* bias = nullptr;  // [V] or null
  };
  using Params = Arguments;

  template <class ProblemShape>
  static constexpr Params to_underlying_arguments(const ProblemShape&, const Arguments& arguments, void*) {
    return arguments;
  }
  template <class ProblemShape>
  static bool can_implement(const ProblemShape&, const Arguments&) {
    return true;
  }
  template <class ProblemShape>
  static size_t get_workspace_size(const ProblemShape&, const Arguments&) {
    return 0;
  }
  template <class ProblemShape>
  static cutlass::Status initialize_workspace(const ProblemShape&, const Arguments&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }

  CUTLASS_HOST_DEVICE OffsetExponential() {}
  CUTLASS_HOST_DEVICE OffsetExponential(const Params& params, const SharedStorage&) : params(params) {}
  CUTLASS_DEVICE bool is_producer_load_needed() const { return false; }
  CUTLASS_DEVICE bool is_C_load_needed() const { return false; }

  Params params;

  template <class... Args>
  CUTLASS_DEVICE auto get_producer_load_callbacks(const fusion::detail::ProducerLoadArgs<Args...>&) {
    return fusion::detail::EmptyProducerLoadCallbacks{};
  }

  template <class Coordinates, class Residue>
  struct Callbacks : fusion::detail::EmptyConsumerStoreCallbacks {
    Coordinates coordinates;  // (CPY, CPY_M, CPY_N, EPI_M, EPI_N) of (m, n)
    Residue residue;          // (m, n)
    int first;                // the thread's first column
    const Params& params;

    CUTLASS_DEVICE Callbacks(Coordinates coordinates, Residue residue, int columns, const Params& params)
        : coordinates(coordinates), residue(residue), first(columns - cute::get<1>(residue)), params(params) {}

    template <class Accumulator, int Size>
    CUTLASS_DEVICE auto visit(const cutlass::Array<Accumulator, Size>& acc, int epi_v, int epi_m, int epi_n,
                              const cutlass::Array<float, Size>& offset, const cutlass::Array<int, Size>& target) {
      auto here = coordinates(cute::_, cute::_, cute::_, epi_m, epi_n);
      const auto column = [&](int i) { return int(cute::get<1>(here(epi_v * Size + i))); };
      const auto counts = [&](int i) {
        return column(i) < cute::get<1>(residue) && column(i) != target[i] - first;
      };
      cutlass::Array<float, Size> t;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < Size; ++i) {
        if constexpr (kCapped) {
          t[i] = acc[i] * params.gain.gain;
        } else {
          t[i] = exponent(acc[i], params.gain, offset[i]);
        }
      }
      if (params.bias != nullptr) {
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < Size; ++i) {
          if (column(i) >= cute::get<1>(residue)) continue;
          const float bias = __ldg(params.bias + first + column(i));
          if constexpr (kCapped) {
            t[i] = fmaf(bias, params.gain.bias_gain, t[i]);
          } else {
            t[i] = add_bias(t[i], bias);
          }
        }
      }
      if constexpr (kCapped) {
        Capped<Size> result;
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < Size; ++i) {
          const Tanh tanh = tanh_and_slope_approx(t[i]);
          const float e = power_of_two(fmaf(tanh.value, params.gain.reach, -offset[i]));
          result.e[i] = counts(i) ? e : 0.0f;
          result.kept[i] = counts(i) ? e * tanh.slope : 0.0f;
        }
        return result;
      } else {
        cutlass::Array<float, Size> result;
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < Size; ++i) result[i] = counts(i) ? power_of_two(t[i]) : 0.0f;
        return result;
      }
    }
  };

  template <bool ReferenceSrc, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(const fusion::detail::ConsumerStoreArgs<Args...>& args) {
    return Callbacks<decltype(args.tCcD), decltype(args.residue_tCcD)>(
        args.tCcD, args.residue_tCcD, int(cute::get<1>(args.problem_shape_mnkl)), params);
  }
};

using PerRow = cute::Stride<cute::_1, cute::_0, cute::_0>;

// Sums in registers, by shuffles between the 4 lanes that hold a row, and one store a row and tile: always in the same
// order. Columns past the vocabulary are 0 already, so it need not look for them.
template <class Tile>
using ColumnsAdded = fusion::Sm90ColReduction<cutlass::plus, cutlass::plus, cutlass::plus, 0, Tile, float, float, kRound,
                                              PerRow, 4, /*EnableNullptr=*/false, /*FinalReduction=*/false,
                                              /*VisitCheckOOB=*/false>;

template <class Tile>
struct RowSums : ColumnsAdded<Tile> {
  using ColumnsAdded<Tile>::ColumnsAdded;
  using ElementAux = cutlass::bfloat16_t;  // CUTLASS asks the root for an element type where nothing is stored

  // Adds what it is given and passes it on; of a capped one, adds E and passes on E times the slope.
  template <class Added>
  struct Callbacks : Added {
    CUTLASS_DEVICE Callbacks(Added&& added) : Added(static_cast<Added&&>(added)) {}
    using Added::visit;
    template <class Accumulator, int Size>
    CUTLASS_DEVICE auto visit(const cutlass::Array<Accumulator, Size>& acc, int epi_v, int epi_m, int epi_n,
                              const Capped<Size>& capped) {
      Added::visit(acc, epi_v, epi_m, epi_n, capped.e);
      return capped.kept;
    }
  };

  template <bool ReferenceSrc, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(const fusion::detail::ConsumerStoreArgs<Args...>& args) {
    auto added = ColumnsAdded<Tile>::template get_consumer_store_callbacks<ReferenceSrc>(args);
    return Callbacks<decltype(added)>(static_cast<decltype(added)&&>(added));
  }
};

template <class Tile, class From, class To>
using RowValues = fusion::Sm90ColBroadcast<0, Tile, From, To, PerRow, /*Alignment=*/1, /*EnableNullptr=*/false>;

template <class Tile, bool kCapped>
using Tree = fusion::Sm90EVT<RowSums<Tile>, fusion::Sm90EVT<OffsetExponential<kCapped>, RowValues<Tile, float, float>,
                                                            RowValues<Tile, int64_t, int>>>;

// One kernel: Shape is (rows, columns, depth) of a tile, Schedule how its two groups of consumer warps share the work,
// kCapped whether logits have a cap, Store whether E goes to memory.
template <class Shape, class Schedule, class EpilogueSchedule, bool kCapped, bool Store>
struct Kernel {
  using Element = cutlass::bfloat16_t;
  using Cluster = cute::Shape<cute::_2, cute::_1, cute::_1>;  // two row tiles read a weight tile once
  using RowMajor = cutlass::layout::RowMajor;
  using ColumnMajor = cutlass::layout::ColumnMajor;
  using Out = cute::conditional_t<Store, Element, void>;

  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Shape, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, RowMajor, 8, Out, RowMajor, 8,
      EpilogueSchedule, Tree<Shape, kCapped>>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, RowMajor, 8, Element, ColumnMajor, 8, float, Shape,
      Cluster, cutlass::gemm::collective::StageCountAutoCarveout<sizeof(typename Epilogue::SharedStorage)>,
      Schedule>::CollectiveOp;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<cutlass::gemm::kernel::GemmUniversal<
      cute::Shape<int, int, int, int>, Mainloop, Epilogue, cutlass::gemm::PersistentScheduler>>;

  static typename Gemm::Arguments arguments(const Exp2Gemm& a, int swizzle) {
    typename Gemm::Arguments arguments{};
    arguments.mode = cutlass::gemm::GemmUniversalMode::kGemm;
    arguments.problem_shape = {int(a.rows), int(a.vocab), int(a.width), 1};
    arguments.mainloop = {static_cast<const Element*>(a.hidden), {a.hidden_stride, cute::_1{}, 0},
                          static_cast<const Element*>(a.weight), {a.weight_stride, cute::_1{}, 0}};
    typename OffsetExponential<kCapped>::Arguments exponential{{}, a.bias};
    if constexpr (kCapped) {
      exponential.gain = cap_of(a.logit_scale, a.softcap);
    } else {
      exponential.gain = split_gain(a.logit_scale);
    }
    arguments.epilogue.thread = {{{a.offset, 0.0f, {}}, {a.target, 0, {}}, exponential}, {a.partial, 0.0f, {}}};
    if constexpr (Store) {
      arguments.epilogue.ptr_D = static_cast<Element*>(a.out);
      arguments.epilogue.dD = {a.out_stride, cute::_1{}, 0};
    }
    arguments.hw_info.device_id = a.device;
    arguments.hw_info.sm_count = a.multiprocessors;
    arguments.scheduler.max_swizzle_size = swizzle;
    arguments.scheduler.raster_order = decltype(arguments.scheduler.raster_order)::AlongM;
    return arguments;
  }

  // CUTLASS's own check, which asks the width of D, too, to be a multiple of 8. TMA asks that of the stride alone, which
  // refuse() looked at; so the check is shown a padded width.
  static bool taken(typename Gemm::Arguments arguments) {
    cute::get<1>(arguments.problem_shape) = (cute::get<1>(arguments.problem_shape) + 7) / 8 * 8;
    return Gemm::can_implement(arguments) == cutlass::Status::kSuccess;
  }

  static GemmStatus launch(const Exp2Gemm& a, int swizzle) {
    const typename Gemm::Arguments arguments = Kernel::arguments(a, swizzle);
    if (!taken(arguments) || Gemm::get_workspace_size(arguments) != 0) return GemmStatus::refused;
    Gemm gemm;
    if (gemm.initialize(arguments, nullptr, a.stream) != cutlass::Status::kSuccess) return GemmStatus::not_initialised;
    return gemm.run(a.stream) == cutlass::Status::kSuccess ? GemmStatus::ok : GemmStatus::not_launched;
  }

  static GemmFacts facts(const Exp2Gemm& a, int swizzle) {
    const typename Gemm::Arguments arguments = Kernel::arguments(a, swizzle);
    return {Gemm::GemmKernel::SharedStorageSize, Mainloop::DispatchPolicy::Stages,
            int(Gemm::GemmKernel::MaxThreadsPerBlock), Gemm::get_workspace_size(arguments), taken(arguments)};
  }
};

// E and its sums, or the sums alone.
template <class Shape, class Schedule, class EpilogueSchedule, bool kCapped>
struct Tiled {
  using Stored = Kernel<Shape, Schedule, EpilogueSchedule, kCapped, true>;
  using Summed = Kernel<Shape, Schedule, EpilogueSchedule, kCapped, false>;

  static GemmStatus launch(const Exp2Gemm& a, int swizzle) {
    return a.out != nullptr ? Stored::launch(a, swizzle) : Summed::launch(a, swizzle);
  }
  static GemmFacts facts(const Exp2Gemm& a, int swizzle) {
    return a.out != nullptr ? Stored::facts(a, swizzle) : Summed::facts(a, swizzle);
  }
};

// The rows of kGemmTiles. Two groups of warps share a tile, 64 rows each; or take turns, a tile each.
template <bool kCapped>
using Tiled128x256 = Tiled<cute::Shape<cute::_128, cute::_256, cute::_64>,
                           cutlass::gemm::KernelTmaWarpSpecializedCooperative,
                           cutlass::epilogue::TmaWarpSpecializedCooperative, kCapped>;
template <bool kCapped>
using Tiled64x256 = Tiled<cute::Shape<cute::_64, cute::_256, cute::_64>,
                          cutlass::gemm::KernelTmaWarpSpecializedPingpong, cutlass::epilogue::TmaWarpSpecialized, kCapped>;

}  // namespace mmrlhf::cuda::sm90
