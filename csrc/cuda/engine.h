// The grouped GEMMs of an sm_90: a kernel that takes the tiles of all experts in turn.
#pragma once

#include "engine_mainloop.h"
#include "epilogues.h"  // for NVRTC, which compiles this file alone
#include "extension.h"

namespace moe_kernels::cuda {
namespace {

// Calls visit(tile of the map, number of its columns) for each tile with rows of this cluster, in
// the same order for the threads that load and for those that multiply. The tile has this block's
// rows, if any.
template <typename Loop, typename Visit>
__device__ void each_tile(const GroupedGemm& args, Visit visit) {
  const int columns = (args.size_n + Loop::kColumns - 1) / Loop::kColumns;
  for (int id = blockIdx.x / Loop::kCluster; id < args.num_tiles * columns;
       id += gridDim.x / Loop::kCluster) {
    const int2 ids = tile_ids(id, args.num_tiles, columns);
    Tile of_map = tile_of(args.tiles, ids.x, args.num_tiles);
    if (of_map.first >= of_map.end) continue;
    Loop::keep_own_rows(of_map);
    visit(of_map, ids.y);
  }
}

template <typename Loop, typename Epilogue>
__global__ void __launch_bounds__(Loop::kThreads, 1)
    engine_kernel(const __grid_constant__ ExpertMaps maps, GroupedGemm args, Epilogue epilogue,
                  bool v_is_float) {
#if defined(__CUDACC__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
  __trap();  // not to leave the sums unwritten without a sign
#else
  Loop::init();
  if (Loop::loads()) {
    sm90::give_registers<Loop::kToLoad>();
    int step = 0;
    each_tile<Loop>(args, [&](const Tile& of_map, int column_tile) {
      if (of_map.group >= args.num_experts) return;
      const ExpertTile tile = expert_tile(args, of_map, column_tile, Loop::kColumns);
      Loop::load(maps, args, tile, Epilogue::kByToken, step);
    });
    Loop::drain(step);
    return;
  }
  sm90::take_registers<Loop::kToMultiply>();
  int step = 0;
  int turn = -1;
  each_tile<Loop>(args, [&](const Tile& of_map, int column_tile) {
    const bool dispatched = of_map.group < args.num_experts;
    if (!Loop::is_own(++turn)) {
      if (dispatched) Loop::pass(args, step);
      return;
    }
    Loop loop;
    Loop::begin_turn(turn);
    if (dispatched) loop.run(args, step);
    Loop::end_turn(turn);
    if constexpr (!Epilogue::kAllRows) {
      if (!dispatched) {
        return epilogue.pass_over(args, of_map, column_tile, 1,
                                  Loop::consumer() % Loop::kTogether, Loop::kTogether);
      }
    }
    store_and_extend(loop, epilogue, args,
                     expert_tile(args, of_map, column_tile, Loop::kColumns), v_is_float);
  });
#endif
}

}  // namespace

#ifndef __CUDACC_RTC__
namespace {

// Describes (num_experts, rows, columns) matrices to the copy engine.
template <typename Loop>
cudaError_t make_map(const void* stack, int num_experts, const GroupedGemm& gemm,
                     sm90::TensorMap& map) {
  const int64_t rows = Loop::kTransposed ? gemm.size_n * (Loop::kGated ? 2 : 1) : gemm.size_k;
  const int64_t columns = Loop::kTransposed ? gemm.size_k : gemm.size_n;
  return sm90::make_tensor_map(map, stack, std::is_same_v<typename Loop::T, __half>, num_experts,
                               rows, columns, Loop::kBoxRows);
}

template <typename Loop, typename Epilogue>
cudaError_t launch_engine(const GroupedGemm& gemm, const Epilogue& epilogue, bool v_is_float,
                          cudaStream_t stream) {
  static_assert(sizeof(typename Loop::Shared) + Epilogue::kScratch <= sm90::kMaxSharedBytes);
  if (gemm.size_k == 0) return cudaErrorInvalidValue;
  const int columns = ceil_div(gemm.size_n, Loop::kColumns);
  const int64_t tiles = static_cast<int64_t>(gemm.num_tiles) * columns;
  if (tiles == 0) return cudaSuccess;
  ExpertMaps maps = {};
  int blocks = 0;
  cudaError_t error = sm90::count_multiprocessors(blocks);
  if (error == cudaSuccess) error = make_map<Loop>(gemm.stack, gemm.num_base, gemm, maps.base);
  if (error == cudaSuccess && gemm.num_experts > gemm.num_base) {
    error = make_map<Loop>(gemm.extra, gemm.num_experts - gemm.num_base, gemm, maps.extra);
  }
  if (error != cudaSuccess) return error;
  const int64_t most = blocks / Loop::kCluster, clusters = tiles < most ? tiles : most;
  return launch_clusters(MOE_KERNEL(engine_kernel, Loop, Epilogue), Loop::kCluster,
                         static_cast<unsigned>(clusters * Loop::kCluster), Loop::kThreads,
                         sizeof(typename Loop::Shared) + Epilogue::kScratch, stream, maps, gemm,
                         epilogue, v_is_float);
}

}  // namespace
#endif

}  // namespace moe_kernels::cuda
