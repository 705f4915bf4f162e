// The low-rank term of a grouped GEMM: it is added to the sums of a main loop, by tensor cores.
#pragma once

#include <type_traits>

#include "grouped_gemm.h"
#include "grouped_gemm_tiles.h"

namespace moe_kernels::cuda {

// Whether this warp writes u of its rows, beside the product.
template <typename Loop>
__device__ inline bool writes_sum(const GroupedGemm& args, const ExpertTile& tile) {
  return args.sum != nullptr && tile.column == 0 && Loop::warp_n() == 0;
}

// Writes zeros to u of a tile's rows of the base modality.
template <typename Loop>
__device__ inline void clear_sum(const GroupedGemm& args, const ExpertTile& tile) {
  using U = typename Loop::U;
#pragma unroll
  for (int i = 0; i < 2 * Loop::kTilesM; ++i) {
    const int row = Loop::row_of(i / 2, i % 2);
    U* sum = static_cast<U*>(args.sum) + (tile.first + row) * args.rank;
    for (int k = Loop::lane() % 4; row < tile.base && k < args.rank; k += 4) {
      sum[k] = from_float<U>(0.0f);
    }
  }
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

// Adds the parts of u in their order: four neighbours of the two rows of fragment i, of which the
// first `sizes` exist. Four parts are on their way at once.
template <bool kVectors, typename Loop>
__device__ inline void add_parts(const GroupedGemm& args, int64_t own, int i, int k,
                                 const int (&sizes)[2], float4 (&sums)[2]) {
  const float* part = static_cast<const float*>(args.u) + own;
#pragma unroll 4
  for (int number = 0; number < args.num_parts; ++number) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float4 more =
          four(part + Loop::below(i, half) * args.rank, k, sizes[half], kVectors);
      float4& sum = sums[half];
      sum = {sum.x + more.x, sum.y + more.y, sum.z + more.z, sum.w + more.w};
    }
    part += static_cast<int64_t>(args.num_rows) * args.rank;
  }
  using U = typename Loop::U;
  if constexpr (!std::is_same_v<U, float>) {
#pragma unroll
    for (float4& sum : sums) {
      const float2 low = unpack<U>(pack<U>(sum.x, sum.y)), high = unpack<U>(pack<U>(sum.z, sum.w));
      sum = {low.x, low.y, high.x, high.y};
    }
  }
}

// Loads s u of the tile's rows from low to high, zeros elsewhere.
template <bool kParts, typename Loop>
__device__ inline void load_u(const GroupedGemm& args, const ExpertTile& tile, float scale, int i,
                              int r, int low, int high, bool vectors, uint32_t (&a)[4]) {
  using U = typename Loop::U;
  const int from = r + Loop::lane() % 4 * 4;
  const int64_t own = (tile.first + Loop::row_of(0, 0)) * args.rank;
  int sizes[2];
  float4 values[2] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = Loop::row_of(i, half);
    const bool present = row >= low && row < high;
    sizes[half] = present ? args.rank : 0;
    if (!present || (kParts && args.num_parts > 0)) continue;
    values[half] = four(static_cast<const U*>(args.u) + own + Loop::below(i, half) * args.rank,
                        from, args.rank, vectors);
  }
  if (kParts && args.num_parts > 0) {
    vectors ? add_parts<true, Loop>(args, own, i, from, sizes, values)
            : add_parts<false, Loop>(args, own, i, from, sizes, values);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (kParts && writes_sum<Loop>(args, tile)) {
      store_four(static_cast<U*>(args.sum) + own + Loop::below(i, half) * args.rank, from,
                 sizes[half], vectors, values[half]);
    }
    a[half] = pack<typename Loop::T>(scale * values[half].x, scale * values[half].y);
    a[2 + half] = pack<typename Loop::T>(scale * values[half].z, scale * values[half].w);
  }
}

// Adds s u V to the rows from low to high, of one modality.
template <bool kParts, typename Loop, typename V>
__device__ inline void add_modality(Loop& loop, const GroupedGemm& args, const ExpertTile& tile,
                                    const V* v, float scale, int low, int high, bool vectors) {
#pragma unroll 1
  for (int r = 0; r < args.rank; r += 16) {
    int rank = args.rank;
    forget(rank);  // or the compiler keeps an address for every fragment, and spills
    uint32_t a[Loop::kTilesM][4];
#pragma unroll
    for (int i = 0; i < Loop::kTilesM; ++i) {
      load_u<kParts, Loop>(args, tile, scale, i, r, low, high, vectors, a[i]);
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
template <typename V, bool kParts, typename Loop>
__device__ inline void extend(Loop& loop, const GroupedGemm& args, const ExpertTile& tile) {
  const int64_t size = static_cast<int64_t>(args.rank) * args.size_n * (Loop::kGated ? 2 : 1);
  const bool vectors = args.rank % 4 == 0 && is_aligned(args.u) && is_aligned(args.v);
  each_modality(args, tile, [&](int m, int low, int high) {
    const V* v = matrix_for<V>(args.v, tile, m, args.experts_of_v, size);
    add_modality<kParts>(loop, args, tile, v, args.scaling[m], low, high, vectors);
  });
}

// Stores the rows of the base modality before the others get their low-rank term, since 0 * Inf
// would poison them. Two calls instead of a loop: for a loop the compiler keeps more addresses than
// there are registers.
template <typename Loop, typename Epilogue>
__device__ inline void store_and_extend(Loop& loop, const Epilogue& epilogue,
                                        const GroupedGemm& args, const ExpertTile& tile,
                                        bool v_is_float) {
  if (tile.base > 0) epilogue.store(loop, args, tile, 0, tile.base);
  if (Epilogue::kParts && tile.base > 0 && writes_sum<Loop>(args, tile)) {
    clear_sum<Loop>(args, tile);
  }
  if (tile.base == tile.count) return;
  if (v_is_float) {
    extend<float, Epilogue::kParts>(loop, args, tile);
  } else {
    extend<typename Loop::T, Epilogue::kParts>(loop, args, tile);
  }
  epilogue.store(loop, args, tile, tile.base, tile.count);
}

}  // namespace moe_kernels::cuda
