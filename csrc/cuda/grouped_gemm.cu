// GEMMs of routed rows and their experts' weights. One kernel serves all of them; its epilogue type
// says what is multiplied and how the sums are stored.
#include "grouped_gemm.h"

#include "engine.h"
#include "epilogues.h"
#include "extension.h"
#include "grouped_gemm_mainloop.h"

namespace moe_kernels::cuda {
namespace {

template <typename T>
__device__ const T* matrix_of(const GroupedGemm& args, int64_t expert, int64_t size) {
  if (expert < args.num_base) return static_cast<const T*>(args.stack) + expert * size;
  return static_cast<const T*>(args.extra) + (expert - args.num_base) * size;
}

template <typename Loop, typename Epilogue>
__global__ void __launch_bounds__(Loop::kThreads, Loop::kResident)
    grouped_gemm_kernel(GroupedGemm args, Epilogue epilogue, bool v_is_float) {
  const int columns = (args.size_n + Loop::kColumns - 1) / Loop::kColumns;
  const int2 ids = tile_ids(blockIdx.x, args.num_tiles, columns);
  const Tile of_map = tile_of(args.tiles, ids.x, args.num_tiles);
  const bool dispatched = of_map.group < args.num_experts;
  if (of_map.first >= of_map.end) return;
  if constexpr (!Epilogue::kAllRows) {
    if (!dispatched) {
      return epilogue.pass_over(args, of_map, ids.y * Loop::kWarpsN, Loop::kWarpsN, threadIdx.x,
                                Loop::kThreads);
    }
  }
  const ExpertTile tile = expert_tile(args, of_map, ids.y, Loop::kColumns);
  Loop loop;
  if (dispatched) {
    const int64_t size = static_cast<int64_t>(args.size_k) * args.size_n;
    loop.run(args, tile,
             matrix_of<typename Loop::T>(args, tile.expert, Epilogue::kGated ? 2 * size : size),
             Epilogue::kByToken);
  }
  store_and_extend(loop, epilogue, args, tile, v_is_float);
}

}  // namespace

#ifndef __CUDACC_RTC__
namespace {

template <typename T, int kBlockM, typename Epilogue>
cudaError_t launch_tiles(const GroupedGemm& gemm, const Epilogue& epilogue, bool v_is_float,
                         cudaStream_t stream) {
  using Loop = Mainloop<T, kBlockM, Epilogue::kTransposed, Epilogue::kGated>;
  const int64_t blocks =
      static_cast<int64_t>(gemm.num_tiles) * ceil_div(gemm.size_n, Loop::kColumns);
  if (blocks == 0) return cudaSuccess;
  constexpr size_t bytes = Loop::kStages * sizeof(typename Loop::Stage);
  static_assert(bytes <= kMaxSharedBytes);
  return launch(MOE_KERNEL(grouped_gemm_kernel, Loop, Epilogue), static_cast<unsigned>(blocks),
                Loop::kThreads, bytes, stream, gemm, epilogue, v_is_float);
}

template <typename T, typename Epilogue>
cudaError_t launch_block(const GroupedGemm& gemm, const Epilogue& epilogue, bool v_is_float,
                         int block_m, cudaStream_t stream) {
  switch (block_m) {
    case 16:
      if constexpr (Epilogue::kScratch == 0) {
        return launch_tiles<T, 16>(gemm, epilogue, v_is_float, stream);
      }
      return cudaErrorInvalidValue;
    case 128:
      return launch_engine<
          Engine<T, Epilogue::kTransposed, Epilogue::kGated, Epilogue::kLong, 1>>(
          gemm, epilogue, v_is_float, stream);
    case 256:
      return launch_engine<
          Engine<T, Epilogue::kTransposed, Epilogue::kGated, Epilogue::kLong, 2>>(
          gemm, epilogue, v_is_float, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

// `make` gives the epilogue of a dtype; its argument is a value of that dtype.
template <typename Make>
cudaError_t launch_gemm(const GroupedGemm& gemm, Make make, Scalar dtype, Scalar v, int block_m,
                        cudaStream_t stream) {
  if (!grouped_gemm_supports(dtype, gemm.size_k, gemm.size_n) ||
      (gemm.rank > 0 && v != Scalar::kFloat && v != dtype)) {
    return cudaErrorInvalidValue;
  }
  const bool v_is_float = v == Scalar::kFloat;
  return dtype == Scalar::kHalf
             ? launch_block<__half>(gemm, make(__half()), v_is_float, block_m, stream)
             : launch_block<__nv_bfloat16>(gemm, make(__nv_bfloat16()), v_is_float, block_m,
                                           stream);
}

}  // namespace

cudaError_t launch_gate_up(const GroupedGemm& gemm, void* pre, void* act, const PartsOfU& u2,
                           Scalar dtype, Scalar v, int block_m, cudaStream_t stream) {
  if (u2.rank > 0 && gemm.rank == 0) return cudaErrorInvalidValue;
  const auto make = [&](auto value) {
    using T = decltype(value);
    return GateUp<T>{static_cast<T*>(pre), static_cast<T*>(act), u2};
  };
  return launch_gemm(gemm, make, dtype, v, block_m, stream);
}

cudaError_t launch_down(const GroupedGemm& gemm, void* out, Scalar dtype, Scalar v, int block_m,
                        cudaStream_t stream) {
  const auto make = [&](auto value) {
    using T = decltype(value);
    return Rows<T, true>{static_cast<T*>(out)};
  };
  return launch_gemm(gemm, make, dtype, v, block_m, stream);
}

cudaError_t launch_d_rows(const GroupedGemm& gemm, void* out, Scalar dtype, Scalar v, int block_m,
                          cudaStream_t stream) {
  const auto make = [&](auto value) {
    using T = decltype(value);
    return Rows<T, false>{static_cast<T*>(out)};
  };
  return launch_gemm(gemm, make, dtype, v, block_m, stream);
}

cudaError_t launch_act_backward(const GroupedGemm& gemm, const ActBackward& act, Scalar dtype,
                                Scalar v, int block_m, cudaStream_t stream) {
  const auto launch = [&](auto folds) {
    const auto make = [&](auto value) {
      return ActGradients<decltype(value), decltype(folds)::value>{act};
    };
    return launch_gemm(gemm, make, dtype, v, block_m, stream);
  };
  if (act.adapters.rank == 0) return launch(std::false_type());
  if (act.adapters.rank > kMaxFoldedRank || gemm.rank == 0 || gemm.rank > kMaxFoldedRank) {
    return cudaErrorInvalidValue;
  }
  return launch(std::true_type());
}
#endif

}  // namespace moe_kernels::cuda
