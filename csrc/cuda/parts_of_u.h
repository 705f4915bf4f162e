// The next GEMM's u from what an epilogue stores: rows times A^T, by tensor cores, while the rows
// are still in registers. A warp has some of the columns, so it gives a part of the sum.
#pragma once

#include "grouped_gemm.h"
#include "grouped_gemm_tiles.h"

namespace moe_kernels::cuda {

// Loads eight neighbours as the words of two fragments.
template <typename T>
__device__ inline void load_eight(const T* from, uint32_t (&words)[4]) {
  load_words(from, words);
}
template <typename T>
__device__ inline void load_eight(const float* from, uint32_t (&words)[4]) {
  const float4 low = four(from, 0, 8, true), high = four(from, 4, 8, true);
  words[0] = pack<T>(low.x, low.y);
  words[1] = pack<T>(low.z, low.w);
  words[2] = pack<T>(high.x, high.y);
  words[3] = pack<T>(high.z, high.w);
}

// What a warp has stored of a tile: kFragments of 8 columns. A lane has eight neighbours of each 32
// columns (see transpose_quad). Tensor cores expect other columns in it; since the order within a
// sum is free, A is loaded in the same order, and no lane needs another's words.
template <typename Loop, int kFragments>
class Stored {
 public:
  // Keeps the words of fragments first to first + 3; zeros where nothing was stored.
  __device__ void keep(int i, int half, int first, const uint32_t (&words)[4], bool present) {
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      kept_[i][first / 4][half][word] = present ? words[word] : 0;
    }
  }

  // Writes this warp's part of u of the rows with an adapter.
  __device__ void multiply(const PartsOfU& to, const GroupedGemm& args,
                           const ExpertTile& tile) const {
    if (to.is_float) {
      multiply_by<float>(to, args, tile);
    } else {
      multiply_by<T>(to, args, tile);
    }
  }

 private:
  using T = typename Loop::T;
  static constexpr int kTilesM = Loop::kTilesM;

  template <typename V>
  __device__ void multiply_by(const PartsOfU& to, const GroupedGemm& args,
                              const ExpertTile& tile) const {
    const int first = Loop::row_of(0, 0) - Loop::lane() / 4;
    const int end = first + Loop::below(kTilesM - 1, 1) + 8;
    const int64_t size = static_cast<int64_t>(to.rank) * args.size_n;
    const int64_t part = tile.part * Loop::kWarpsN + Loop::warp_n();
    float* out = to.parts + (part * args.num_rows + tile.first) * to.rank;
    each_modality(args, tile, [&](int m, int low, int high) {
      if (low >= end || high <= first) return;  // not of this warp
      const V* a = matrix_for<V>(to.a, tile, m, to.experts, size);
#pragma unroll 1
      for (int r = 0; r < to.rank; r += 16) {
        float sums[kTilesM][2][4] = {};
        sum_columns(to.rank, args.size_n, tile, a, r, sums);
        store(to.rank, low, high, r, sums, out);
      }
    });
  }

  // Sums 16 columns of u. Column c of fragment f is c / 2 * 4 + 2 * f + c % 2 of them, so that a
  // lane has four neighbours.
  template <typename V>
  __device__ void sum_columns(int rank, int size_n, const ExpertTile& tile, const V* a, int r,
                              float (&sums)[kTilesM][2][4]) const {
    const int column = tile.column + Loop::column_of(Loop::lane() % 4), of_lane = Loop::lane() / 4;
#pragma unroll
    for (int f = 0; f < 2; ++f) {
      const int row = r + of_lane / 2 * 4 + 2 * f + of_lane % 2;
      const V* own = a + static_cast<int64_t>(row) * size_n + column;
#pragma unroll
      for (int group = 0; group < kFragments / 4; ++group) {
        uint32_t b[4] = {};
        if (row < rank && column + 32 * group < size_n) load_eight<T>(own + 32 * group, b);
#pragma unroll
        for (int step = 0; step < 4; step += 2) {
          const uint32_t of_step[2] = {b[step], b[step + 1]};
#pragma unroll
          for (int i = 0; i < kTilesM; ++i) {
            const auto& rows = kept_[i][group];
            const uint32_t words[4] = {rows[0][step], rows[1][step], rows[0][step + 1],
                                       rows[1][step + 1]};
            cuda::multiply<T>(sums[i][f], words, of_step);
          }
        }
      }
    }
  }

  // Stores 16 columns of u of the rows from low to high.
  __device__ void store(int rank, int low, int high, int r, const float (&sums)[kTilesM][2][4],
                        float* out) const {
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = Loop::row_of(i, half);
        if (row < low || row >= high) continue;
        const auto& [first, second] = sums[i];
        store_four(out + static_cast<int64_t>(row) * rank, r + Loop::lane() % 4 * 4, rank,
                   rank % 4 == 0,
                   {first[2 * half], first[2 * half + 1], second[2 * half], second[2 * half + 1]});
      }
    }
  }

  uint32_t kept_[kTilesM][kFragments / 4][2][4];  // half of the rows, and word
};

}  // namespace moe_kernels::cuda
