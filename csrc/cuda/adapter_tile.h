// What the gradients of adapters need of a tile of dA', while its gradients are at hand: no pass
// has to read them again.
//
// Of a tile's adapted rows: du1 = d_pre B1, a part for each tile of columns; and sums over the rows
// of (s u1)^T d_pre and (s w du2)^T a, which are parts of dB1 and dA2. The gradients lie in shared
// memory, 32 columns of all rows at a time. A warp then takes du1 of its own rows, and the sums of
// 8 of the columns.
#pragma once

#include "grouped_gemm.h"
#include "grouped_gemm_tiles.h"

namespace moe_kernels::cuda {

template <typename T>
__device__ inline float weight_of(const ActBackward& with, int64_t slot) {
  return with.weights_are_float ? static_cast<const float*>(with.weights)[slot]
                                : to_float(static_cast<const T*>(with.weights)[slot]);
}

// Rows of a tile in shared memory. The 16-byte chunks of a row are in another order in each, so
// that eight rows of one chunk come from different banks.
template <typename T>
struct FoldedRows {
  static constexpr int kRows = kFoldedRows, kColumns = 32;
  T gate[kRows * kColumns], up[kRows * kColumns], act[kRows * kColumns];
  T u1[kRows * kMaxFoldedRank], du2[kRows * kMaxFoldedRank];  // times their factors
  float weights[kRows], dots[kRows];

  static __device__ int at(int row, int chunk) {
    return row * kColumns + (chunk ^ (row / 2 & 3)) * 8;
  }
  static __device__ int at_rank(int row, int chunk) {
    return row * kMaxFoldedRank + (chunk ^ (row / 4 & 1)) * 8;
  }
};

template <typename Loop>
struct AdapterTile {
  using T = typename Loop::T;
  using Rows = FoldedRows<T>;
  static constexpr int kTilesM = Loop::kTilesM, kTilesR = kMaxFoldedRank / 8;
  static constexpr int kBytes = sizeof(Rows);
  static_assert(Loop::kBlockM == kFoldedRows && Loop::kTogether == kFoldedRows &&
                kMaxFoldedRank == 16 && Rows::kColumns == 8 * (Loop::kTogether / 32));

  const GroupedGemm& args;
  const ActBackward& with;
  const ExpertTile& tile;
  Rows& rows = shared();

  static __device__ Rows& shared() { return *reinterpret_cast<Rows*>(Loop::scratch(kBytes)); }

  // A thread has a row.
  static __device__ int row_of_thread() {
    int row = Loop::consumer() % Loop::kTogether;
    forget(row);
    return row;
  }

  __device__ void write_weights(int low, int high) {
    const int row = row_of_thread();
    rows.weights[row] = row >= low && row < high
                            ? weight_of<T>(with, args.perm[tile.first + row])
                            : 0.0f;
    Loop::meet();
  }

  // Adds up <dA', a> of a row, of which each of four lanes has a part.
  __device__ void add_dot(int row, bool first, float dot) {
    dot += __shfl_xor_sync(0xffffffffu, dot, 1);
    dot += __shfl_xor_sync(0xffffffffu, dot, 2);
    if (Loop::lane() % 4 == 0) rows.dots[row] = first ? dot : rows.dots[row] + dot;
  }

  __device__ void store_dots(int low, int high) const {
    const int row = row_of_thread();
    if (row < low || row >= high) return;
    with.dots[tile.part * with.num_rows + args.perm[tile.first + row]] = rows.dots[row];
  }

  // The rows of a modality, and the slot of their sums.
  struct Pair {
    int low, high, modality;
    int64_t slot;

    __device__ bool has(int row) const { return row >= low && row < high; }
  };

  __device__ Pair pair_of(int expert, int modality, int low, int high) const {
    const int64_t* segment = args.segments + expert * (args.num_modalities + 1);
    const int64_t start = segment[0], first = segment[modality + 1];
    const int64_t before = (tile.first - start) / kFoldedRows - (first - start) / kFoldedRows;
    const int number = expert * args.num_modalities + modality;
    return {low, high, modality, first_folded(first, number) + before};
  }

  // Uses the gradients of 32 columns from `column` on, which all threads have written.
  __device__ void add(int column) {
    ExpertTile here = tile;
    forget(here.expert);  // or the compiler keeps all that follows from it, and spills
    each_modality(args, here, [&](int modality, int low, int high) {
      const Pair pair = pair_of(here.expert, modality, low, high);
      write_left(pair);
      Loop::meet();
      if (with.adapters.du1 != nullptr) {
        const int64_t size = static_cast<int64_t>(2) * args.size_n * with.adapters.rank;
        const auto b1 = [&](auto value) {
          return matrix_for<decltype(value)>(with.adapters.b1, here, modality, args.num_base, size);
        };
        with.adapters.b_is_float ? add_du1(pair, b1(0.0f), column) : add_du1(pair, b1(T()), column);
      }
      sum_rows(pair, column);
      Loop::meet();
    });
  }

  // Writes s u1 and s w du2 of the pair's rows, and zeros for others.
  __device__ void write_left(const Pair& pair) {
    const int row = row_of_thread();
    const bool present = pair.has(row);
    if (with.adapters.d_b1 != nullptr) {
      write_row(rows.u1, static_cast<const T*>(with.adapters.u1), with.adapters.rank,
                with.adapters.scaling[pair.modality], row, present);
    }
    if (with.adapters.d_a2 != nullptr) {
      write_row(rows.du2, static_cast<const float*>(args.u), args.rank,
                args.scaling[pair.modality] * rows.weights[row], row, present);
    }
  }

  template <typename U>
  __device__ void write_row(T* to, const U* u, int rank, float factor, int row, bool present) {
    const U* from = u + (tile.first + row) * rank;
#pragma unroll
    for (int chunk = 0; chunk < kTilesR; ++chunk) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int n = 8 * chunk + 2 * i;
        words[i] = pack<T>(present && n < rank ? factor * to_float(from[n]) : 0.0f,
                           present && n + 1 < rank ? factor * to_float(from[n + 1]) : 0.0f);
      }
      store_words(to + Rows::at_rank(row, chunk), words);
    }
  }

  // Adds d_pre B1 of the pair's rows to what 32 columns before have left. b1 (2 * size_n, rank).
  template <typename B>
  __device__ void add_du1(const Pair& pair, const B* b1, int column) const {
    int rank = with.adapters.rank, lane = Loop::lane();
    forget(rank);  // or the compiler keeps what follows from both, and spills
    forget(lane);
    float* const out = with.adapters.du1 + (tile.part * with.num_rows + tile.first) * rank;
    const auto each = [&](auto visit) {
#pragma unroll
      for (int at = 0; at < kTilesM * kTilesR * 4; ++at) {
        const int i = at / (4 * kTilesR), q = at / 4 % kTilesR, c = at % 4;
        const int row = Loop::row_of(i, c / 2), n = 8 * q + lane % 4 * 2 + c % 2;
        visit(i, q, c, pair.has(row) && n < rank, row * rank + n);
      }
    };
    float sums[kTilesM][kTilesR][4];
    each([&](int i, int q, int c, bool present, int place) {
      sums[i][q][c] = present && column > tile.column ? out[place] : 0.0f;
    });
#pragma unroll
    for (int part = 0; part < 4; ++part) {  // 16 columns of gate and of up, and the next of both
      const T* from = part % 2 == 0 ? rows.gate : rows.up;
      uint32_t b[kTilesR][2];
#pragma unroll
      for (int q = 0; q < kTilesR; ++q) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int n = 8 * q + lane / 4, k = column + part / 2 * 16 + 8 * half + lane % 4 * 2;
          const B* own = b1 + (k + part % 2 * args.size_n) * rank + n;
          b[q][half] = n < rank && k < args.size_n ? pack<T>(to_float(own[0]), to_float(own[rank]))
                                                   : 0;
        }
      }
#pragma unroll
      for (int i = 0; i < kTilesM; ++i) {
        const int row = Loop::row_of(i, 0) - lane / 4 + lane % 16;
        uint32_t a[4];
        load_matrices(a, from + Rows::at(row, part / 2 * 2 + lane / 16));
#pragma unroll
        for (int q = 0; q < kTilesR; ++q) multiply<T>(sums[i][q], a, b[q]);
      }
    }
    each([&](int i, int q, int c, bool present, int place) {
      if (present) out[place] = sums[i][q][c];
    });
  }

  // Words of two rows, of which those of other modalities become zeros.
  __device__ void keep(const Pair& pair, int row, uint32_t (&words)[4], int at) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t low = pair.has(row + 8 * i) ? 0xffffu : 0;
      const uint32_t high = pair.has(row + 8 * i + 1) ? 0xffff0000u : 0;
      words[at + i] &= low | high;
    }
  }

  // Sums over the pair's rows, of 8 columns for each warp.
  __device__ void sum_rows(const Pair& pair, int column) {
    const int warp = Loop::warp_m();
    int lane = Loop::lane();
    forget(lane);
    const bool for_b1 = with.adapters.d_b1 != nullptr, for_a2 = with.adapters.d_a2 != nullptr;
    float gate[4] = {}, up[4] = {}, act[4] = {};
#pragma unroll 2
    for (int k = 0; k < Rows::kRows; k += 16) {
      const int row = k + lane % 16;
      uint32_t right[4], more[4], left[4];
      // Two matrices of each: 16 rows of 8 columns.
      load_matrices_transposed(right, (lane < 16 ? rows.gate : rows.up) + Rows::at(row, warp));
      load_matrices_transposed(more, rows.act + Rows::at(row, warp));
      keep(pair, k + lane % 4 * 2, right, 0);
      keep(pair, k + lane % 4 * 2, right, 2);
      keep(pair, k + lane % 4 * 2, more, 0);
      const int of_left = k + lane % 8 + lane / 16 * 8;
      if (for_b1) {
        load_matrices_transposed(left, rows.u1 + Rows::at_rank(of_left, lane / 8 % 2));
        multiply<T>(gate, left, {right[0], right[1]});
        multiply<T>(up, left, {right[2], right[3]});
      }
      if (for_a2) {
        load_matrices_transposed(left, rows.du2 + Rows::at_rank(of_left, lane / 8 % 2));
        multiply<T>(act, left, {more[0], more[1]});
      }
    }
    const int64_t size = static_cast<int64_t>(args.size_n) * with.adapters.rank;
    float* const b1 = with.adapters.d_b1 + 2 * pair.slot * size;
    float* const a2 = with.adapters.d_a2 + pair.slot * args.rank * args.size_n;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int rank = lane / 4 + i / 2 * 8, n = column + 8 * warp + lane % 4 * 2 + i % 2;
      if (n >= args.size_n) continue;
      if (for_b1 && rank < with.adapters.rank) {
        b1[n * with.adapters.rank + rank] = gate[i];
        b1[size + n * with.adapters.rank + rank] = up[i];
      }
      if (for_a2 && rank < args.rank) a2[rank * args.size_n + n] = act[i];
    }
  }
};

}  // namespace moe_kernels::cuda
