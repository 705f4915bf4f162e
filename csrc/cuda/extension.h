// The low-rank term of a grouped GEMM: it is added to the sums of a main loop, by tensor cores.
#pragma once

#include "grouped_gemm.h"
#include "grouped_gemm_tiles.h"

namespace moe_kernels::cuda {

// Loads four neighbours of a row of `size` from k on, zeros beyond it. `vectors`: rows consist of
// whole vectors.
__device__ inline float4 four(const float* row, int k, int size, bool vectors) {
  if (vectors && k < size) return *reinterpret_cast<const float4*>(row + k);
  return {k < size ? row[k] : 0.0f, k + 1 < size ? row[k + 1] : 0.0f,
          k + 2 < size ? row[k + 2] : 0.0f, k + 3 < size ? row[k + 3] : 0.0f};
}
template <typename T>
__device__ inline float4 four(const T* row, int k, int size, bool vectors) {
  if (vectors && k < size) {
    const uint2 words = *reinterpret_cast<const uint2*>(row + k);
    const float2 low = unpack<T>(words.x), high = unpack<T>(words.y);
    return {low.x, low.y, high.x, high.y};
  }
  return {k < size ? to_float(row[k]) : 0.0f, k + 1 < size ? to_float(row[k + 1]) : 0.0f,
          k + 2 < size ? to_float(row[k + 2]) : 0.0f, k + 3 < size ? to_float(row[k + 3]) : 0.0f};
}

// Loads fragment j of V for 16 steps of the rank from r on. The four lanes of a column hold four
// neighbours each, and so do those of a row of u: the order within a sum is free.
template <typename Loop, typename V>
__device__ inline void load_v(const GroupedGemm& args, const V* v, int column, int rank, int r,
                              int j, bool vectors, uint32_t (&b)[2]) {
  constexpr int kColumns = Loop::kWarpColumns;
  const int from = r + Loop::lane() % 4 * 4, n = column + Loop::column_of(0) + Loop::lane() / 4;
  // A part that all threads share needs no registers.
  const int on = j % (kColumns / 8) * 8;
  const int row = on + (j * 8 < kColumns ? 0 : args.size_n);
  const int64_t ld = args.size_n;
  float4 values = {0.0f, 0.0f, 0.0f, 0.0f};
  if (n + on < args.size_n) {
    if constexpr (Loop::kTransposed) {
      const V* own = v + static_cast<int64_t>(n) * rank;
      values = four(own + row * rank, from, rank, vectors);
    } else {
      const V* own = v + from * ld + n + on;
      if (from < rank) values.x = to_float(own[0]);
      if (from + 1 < rank) values.y = to_float(own[ld]);
      if (from + 2 < rank) values.z = to_float(own[2 * ld]);
      if (from + 3 < rank) values.w = to_float(own[3 * ld]);
    }
  }
  b[0] = pack<typename Loop::T>(values.x, values.y);
  b[1] = pack<typename Loop::T>(values.z, values.w);
}

// Loads s u of the tile's rows from low to high, zeros elsewhere.
template <typename Loop>
__device__ inline void load_u(const GroupedGemm& args, const typename Loop::U* u, float scale,
                              int i, int r, int low, int high, bool vectors, uint32_t (&a)[4]) {
  const int from = r + Loop::lane() % 4 * 4;
  const auto* own = u + static_cast<int64_t>(Loop::row_of(0, 0)) * args.rank;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = Loop::row_of(i, half);
    float4 values = {0.0f, 0.0f, 0.0f, 0.0f};
    if (row >= low && row < high) {
      values = four(own + Loop::below(i, half) * args.rank, from, args.rank, vectors);
    }
    a[half] = pack<typename Loop::T>(scale * values.x, scale * values.y);
    a[2 + half] = pack<typename Loop::T>(scale * values.z, scale * values.w);
  }
}

// Adds s u V to the rows from low to high, of one modality.
template <typename Loop, typename V>
__device__ inline void add_modality(Loop& loop, const GroupedGemm& args, const ExpertTile& tile,
                                    const typename Loop::U* u, const V* v, float scale, int low,
                                    int high, bool vectors) {
#pragma unroll 1
  for (int r = 0; r < args.rank; r += 16) {
    int rank = args.rank;
    forget(rank);  // or the compiler keeps an address for every fragment, and spills
    uint32_t a[Loop::kTilesM][4];
#pragma unroll
    for (int i = 0; i < Loop::kTilesM; ++i) {
      load_u<Loop>(args, u, scale, i, r, low, high, vectors, a[i]);
    }
#pragma unroll
    for (int j = 0; j < Loop::kTilesN; ++j) {
      uint32_t b[2];
      load_v<Loop>(args, v, tile.column, rank, r, j, vectors, b);
#pragma unroll
      for (int i = 0; i < Loop::kTilesM; ++i) {
        multiply<typename Loop::T>(loop.acc[i][j], a[i], b);
      }
    }
  }
}

// Adds s u V, in one pass for each modality of the tile. Rows of the base modality must have been
// stored before: rows of another modality get 0 * V, which is zero only while V is finite.
template <typename V, typename Loop>
__device__ inline void extend(Loop& loop, const GroupedGemm& args, const ExpertTile& tile) {
  const int64_t size = static_cast<int64_t>(args.rank) * args.size_n * (Loop::kGated ? 2 : 1);
  const auto* u = static_cast<const typename Loop::U*>(args.u) + tile.first * args.rank;
  const auto* stack = static_cast<const V*>(args.v);
  const bool vectors = args.rank % 4 == 0 && is_aligned(args.u) && is_aligned(args.v);
  for (int m = 0; m < args.num_modalities; ++m) {
    const int64_t* segment = args.segments + tile.expert * (args.num_modalities + 1) + m + 1;
    const int64_t low = segment[0] - tile.first, high = segment[1] - tile.first;
    if (low >= high || low >= tile.count || high <= 0) continue;
    const int64_t expert = args.experts_of_v == 1 ? 0 : tile.expert;
    const int64_t index = static_cast<int64_t>(m) * args.experts_of_v + expert;
    add_modality(loop, args, tile, u, stack + index * size, args.scaling[m],
                 static_cast<int>(low < 0 ? 0 : low),
                 static_cast<int>(high < tile.count ? high : tile.count), vectors);
  }
}

// Stores the rows of the base modality before the others get their low-rank term, since 0 * Inf
// would poison them. Two calls instead of a loop: for a loop the compiler keeps more addresses than
// there are registers.
template <typename Loop, typename Epilogue>
__device__ inline void store_and_extend(Loop& loop, const Epilogue& epilogue,
                                        const GroupedGemm& args, const ExpertTile& tile,
                                        bool v_is_float) {
  if (tile.base > 0) epilogue.store(loop, args, tile, 0, tile.base);
  if (tile.base == tile.count) return;
  if (v_is_float) {
    extend<float>(loop, args, tile);
  } else {
    extend<typename Loop::T>(loop, args, tile);
  }
  epilogue.store(loop, args, tile, tile.base, tile.count);
}

}  // namespace moe_kernels::cuda
