// Adds s u V to adapted rows, which are read and written once, 16 bytes per thread and access.
#include "add_low_rank.h"

#include "extension.h"
#include "grouped_gemm_mainloop.h"

namespace moe_kernels::cuda {
namespace {

constexpr int kRows = 32;  // rows of a block at a time

// Calls visit(half, j, place, present) for the eight columns of `out` that this thread moves of
// each row and of fragments j to j + 3, see transpose_quad.
template <typename Loop, typename Visit>
__device__ void visit_rows(const AddLowRank& args, const ExpertTile& tile, Visit visit) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = Loop::row_of(0, half);
    const int64_t token = row < tile.count ? args.perm[tile.first + row] : 0;
    auto* of_row = static_cast<typename Loop::T*>(args.out) + token * args.width;
#pragma unroll
    for (int j = 0; j < Loop::kTilesN; j += 4) {
      const int n = tile.column + Loop::column_of(j + Loop::lane() % 4);
      visit(half, j, of_row + n, row < tile.count && n < args.width);
    }
  }
}

template <typename Loop, typename V>
__device__ void add_to_rows(const AddLowRank& args, const ExpertTile& tile, int64_t modality) {
  using T = typename Loop::T;
  Loop loop;
  visit_rows<Loop>(args, tile, [&](int half, int j, const T* from, bool present) {
    uint32_t words[4] = {};
    if (present) load_words(from, words);
    transpose_quad(words);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float2 pair = unpack<T>(words[e]);
      loop.acc[0][j + e][2 * half] = pair.x;
      loop.acc[0][j + e][2 * half + 1] = pair.y;
    }
  });
  GroupedGemm sizes = {};
  sizes.u = args.u;
  sizes.rank = args.rank;
  sizes.size_n = args.width;
  const int64_t size = static_cast<int64_t>(args.rank) * args.width;
  const bool vectors = args.rank % 4 == 0 && is_aligned(args.u) && is_aligned(args.v);
  add_modality<false>(loop, sizes, tile, static_cast<const V*>(args.v) + modality * size,
                      args.scaling[modality], 0, tile.count, vectors);
  visit_rows<Loop>(args, tile, [&](int half, int j, T* to, bool present) {
    uint32_t words[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float* values = &loop.acc[0][j + e][2 * half];
      words[e] = pack<T>(values[0], values[1]);
    }
    transpose_quad(words);
    if (present) store_words(to, words);
  });
}

// Four blocks per multiprocessor: without the bound the compiler uses too few registers and spills.
template <typename Loop, typename V>
__global__ void __launch_bounds__(Loop::kThreads, 4) add_low_rank_kernel(AddLowRank args) {
  const Tile of_map = tile_of(args.tiles, blockIdx.x, args.num_tiles);
  for (int64_t first = of_map.first; first < of_map.end; first += kRows) {
    const int64_t left = of_map.end - first;
    const int count = left < kRows ? static_cast<int>(left) : kRows;
    const int part = blockIdx.y;
    add_to_rows<Loop, V>(args, {0, first, count, 0, part * Loop::kColumns, part}, of_map.group);
  }
}

}  // namespace

#ifndef __CUDACC_RTC__
namespace {

template <typename T, typename V>
cudaError_t launch_tiles(const AddLowRank& args, cudaStream_t stream) {
  using Last = Mainloop<T, kRows, true, false>;
  using First = Mainloop<T, kRows, false, false>;
  const auto kernel = args.rank_last ? MOE_KERNEL(add_low_rank_kernel, Last, V)
                                     : MOE_KERNEL(add_low_rank_kernel, First, V);
  const dim3 grid(args.num_tiles, ceil_div(args.width, Last::kColumns));
  return launch(kernel, grid, Last::kThreads, 0, stream, args);
}

}  // namespace

bool add_low_rank_supports(Scalar out, int64_t width) {
  return out != Scalar::kFloat && width % 8 == 0;
}

cudaError_t launch_add_low_rank(const AddLowRank& args, Scalar out, Scalar v,
                                cudaStream_t stream) {
  const bool v_is_float = v == Scalar::kFloat;
  if (!add_low_rank_supports(out, args.width) || (!v_is_float && v != out)) {
    return cudaErrorInvalidValue;
  }
  if (args.num_tiles == 0 || args.width == 0) return cudaSuccess;
  if (out == Scalar::kHalf) {
    return v_is_float ? launch_tiles<__half, float>(args, stream)
                      : launch_tiles<__half, __half>(args, stream);
  }
  return v_is_float ? launch_tiles<__nv_bfloat16, float>(args, stream)
                    : launch_tiles<__nv_bfloat16, __nv_bfloat16>(args, stream);
}
#endif

}  // namespace moe_kernels::cuda
