// Adds s u V to adapted rows, which are read and written once, 16 bytes per thread and access.
#include "add_low_rank.h"

#include "grouped_gemm_mainloop.h"

namespace moe_kernels::cuda {
namespace {

constexpr int kRows = 32;  // rows of a block at a time

// Calls visit(half, j, place, present) for the eight columns of `out` that this thread moves of
// each row and of fragments j to j + 3, see transpose_quad.
template <typename Loop, typename Visit>
__device__ void visit_rows(const AddLowRank& given, const ExpertTile& tile, Visit visit) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = Loop::row_of(0, half);
    const int64_t token = row < tile.count ? given.perm[tile.first + row] : 0;
    auto* of_row = static_cast<typename Loop::T*>(given.out) + token * given.width;
#pragma unroll
    for (int j = 0; j < kTilesN; j += 4) {
      const int n = tile.column + Loop::column_of(j + Loop::lane() % 4);
      visit(half, j, of_row + n, row < tile.count && n < given.width);
    }
  }
}

template <typename Loop, typename V>
__device__ void add_to_rows(const AddLowRank& given, const ExpertTile& tile, int64_t modality) {
  using T = typename Loop::T;
  Loop loop;
  visit_rows<Loop>(given, tile, [&](int half, int j, const T* from, bool present) {
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
  sizes.rank = given.rank;
  sizes.size_n = given.width;
  const int64_t size = static_cast<int64_t>(given.rank) * given.width;
  const bool vectors = given.rank % 4 == 0 && is_aligned(given.u) && is_aligned(given.v);
  loop.add_modality(sizes, tile,
                    static_cast<const typename Loop::U*>(given.u) + tile.first * given.rank,
                    static_cast<const V*>(given.v) + modality * size, given.scaling[modality], 0,
                    tile.count, vectors);
  visit_rows<Loop>(given, tile, [&](int half, int j, T* to, bool present) {
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
__global__ void __launch_bounds__(Loop::kThreads, 4) add_low_rank_kernel(AddLowRank given) {
  const Tile of_map = tile_of(given.tiles, blockIdx.x, given.num_tiles);
  for (int64_t first = of_map.first; first < of_map.end; first += kRows) {
    const int64_t left = of_map.end - first;
    const int count = left < kRows ? static_cast<int>(left) : kRows;
    const int part = blockIdx.y;
    add_to_rows<Loop, V>(given, {0, first, count, 0, part * Loop::kColumns, part}, of_map.group);
  }
}

template <typename T, typename V>
cudaError_t launch_tiles(const AddLowRank& given, cudaStream_t stream) {
  using Last = Mainloop<T, kRows, true, false>;
  using First = Mainloop<T, kRows, false, false>;
  const auto kernel =
      given.rank_last ? add_low_rank_kernel<Last, V> : add_low_rank_kernel<First, V>;
  const dim3 grid(given.num_tiles, ceil_div(given.width, Last::kColumns));
  return launch(kernel, grid, Last::kThreads, 0, stream, given);
}

}  // namespace

bool add_low_rank_supports(Scalar out, int64_t width) {
  return out != Scalar::kFloat && width % 8 == 0;
}

cudaError_t launch_add_low_rank(const AddLowRank& given, Scalar out, Scalar v,
                                cudaStream_t stream) {
  const bool v_is_float = v == Scalar::kFloat;
  if (!add_low_rank_supports(out, given.width) || (!v_is_float && v != out)) {
    return cudaErrorInvalidValue;
  }
  if (given.num_tiles == 0 || given.width == 0) return cudaSuccess;
  if (out == Scalar::kHalf) {
    return v_is_float ? launch_tiles<__half, float>(given, stream)
                      : launch_tiles<__half, __half>(given, stream);
  }
  return v_is_float ? launch_tiles<__nv_bfloat16, float>(given, stream)
                    : launch_tiles<__nv_bfloat16, __nv_bfloat16>(given, stream);
}

}  // namespace moe_kernels::cuda
