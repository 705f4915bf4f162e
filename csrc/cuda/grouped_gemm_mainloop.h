// A tile of left W + s u V on tensor cores. Asynchronous copies run several steps of k ahead into
// shared memory. There the 16-byte chunks of a row are in a different order in each of 8 rows, so
// that eight rows of one chunk come from different banks.
//
// A block has kBlockM rows of one expert and 128 columns; a warp has 64 of the columns. If gated,
// they are 64 columns of gate and the same columns of up, and one thread holds both values of a
// column. The order of k is the same for every tile, and a row's arithmetic does not depend on its
// place.
#pragma once

#include <type_traits>

#include "device.h"
#include "grouped_gemm.h"
#include "grouped_gemm_tiles.h"

namespace moe_kernels::cuda {

constexpr int kBlockK = 64;

// kTransposed: matrices are stored (size_n, size_k), V (size_n, rank); else (size_k, size_n), V
// (rank, size_n). kGated: columns of gate and, size_n further on, of up.
template <typename T_, int kBlockM_, bool kTransposed_, bool kGated_>
struct Mainloop {
  static constexpr bool kTransposed = kTransposed_, kGated = kGated_;
  using T = T_;
  using U = std::conditional_t<kTransposed, T, float>;
  static constexpr int kBlockM = kBlockM_;
  static constexpr int kWarpsM = kBlockM == 16 ? 1 : 2, kWarpsN = 2;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kTilesM = kBlockM / (16 * kWarpsM);
  static constexpr int kTilesN = 8;  // fragments of 8 columns of a warp
  static constexpr int kStages = kBlockM == 16 ? 4 : 3;
  static constexpr int kResident = kBlockM == 128 ? 2 : 3;  // blocks per multiprocessor
  static constexpr int kChunks = kBlockK / 8;               // chunks of 16 bytes in a row
  static constexpr int kRowsAtOnce = kThreads / kChunks;
  static constexpr int kLeftRows = kBlockM / kRowsAtOnce;  // rows of which a thread copies a chunk
  static constexpr int kColumns = kGated ? kBlockN / 2 : kBlockN;  // of the output
  static constexpr int kWarpColumns = kColumns / kWarpsN;

  struct Stage {
    T left[kBlockM * kBlockK];
    T right[kBlockN * kBlockK];
  };

  float acc[kTilesM][kTilesN][4] = {};

  static __device__ int warp_m() { return threadIdx.x / 32 / kWarpsN; }
  static __device__ int warp_n() { return threadIdx.x / 32 % kWarpsN; }
  static __device__ int lane() { return threadIdx.x % 32; }
  static __device__ Stage* stages() { return reinterpret_cast<Stage*>(shared_memory()); }

  // Row of the tile that acc[i][.][2 * half] and the next element belong to.
  static __device__ int row_of(int i, int half) {
    return (warp_m() * kTilesM + i) * 16 + half * 8 + lane() / 4;
  }
  // Distance of that row from row_of(0, 0).
  static __device__ int below(int i, int half) { return 16 * i + 8 * half; }
  // First column of the output of fragment j.
  static __device__ int column_of(int j) {
    return warp_n() * kWarpColumns + j % (kWarpColumns / 8) * 8;
  }
  // Offset of the eight columns that this thread stores of row_of(0, 0), see transpose_quad, in a
  // matrix of rows of `width`. Its other columns are further on by an offset that all threads
  // share.
  static __device__ int64_t own(const ExpertTile& tile, int width) {
    return (tile.first + row_of(0, 0)) * width + tile.column + column_of(lane() % 4);
  }
  // Column of the output for a column of the shared tile, and whether it belongs to up.
  static __device__ int stored_column(int at) {
    return kGated ? at / 64 * 32 + at % 32 : at;
  }
  static __device__ bool is_up(int at) { return kGated && at / 32 % 2 == 1; }

  // Finds the rows of left that this thread copies; beyond the end any row does.
  static __device__ void find_rows(const GroupedGemm& args, const ExpertTile& tile, bool by_token,
                                   int (&rows)[kLeftRows]) {
#pragma unroll
    for (int i = 0; i < kLeftRows; ++i) {
      const int local = threadIdx.x / kChunks + i * kRowsAtOnce;
      const int64_t row = tile.first + (local < tile.count ? local : 0);
      rows[i] = by_token ? token_of(args.perm, row, args.top_k) : static_cast<int>(row);
    }
  }

  static __device__ void load_left(const GroupedGemm& args, const ExpertTile& tile,
                                   const int (&rows)[kLeftRows], int k, T* to) {
    const int chunk = threadIdx.x % kChunks, from = k + chunk * 8;
    const auto* left = static_cast<const T*>(args.left);
#pragma unroll
    for (int i = 0; i < kLeftRows; ++i) {
      const int local = threadIdx.x / kChunks + i * kRowsAtOnce;
      copy_async(to + local * kBlockK + (chunk ^ (local & 7)) * 8,
                 left + static_cast<int64_t>(rows[i]) * args.size_k + from,
                 local < tile.count && from < args.size_k);
    }
  }

  // An address is a thread's own part plus one that all threads share, which needs no registers.
  static __device__ void load_right(const GroupedGemm& args, const T* matrix, int column, int k,
                                    T* to) {
    if constexpr (kTransposed) {
      const int chunk = threadIdx.x % kChunks, local = threadIdx.x / kChunks;
      const int from = k + chunk * 8, n = column + local;
      const T* own = matrix + static_cast<int64_t>(n) * args.size_k + from;
#pragma unroll
      for (int i = 0; i < kBlockN / kRowsAtOnce; ++i) {
        const int at = i * kRowsAtOnce, on = stored_column(at);
        const int64_t row = on + (is_up(at) ? args.size_n : 0);
        copy_async(to + (at + local) * kBlockK + (chunk ^ ((at + local) & 7)) * 8,
                   own + row * args.size_k, n + on < args.size_n && from < args.size_k);
      }
    } else {
      constexpr int kAcross = kBlockN / 8, kAtOnce = kThreads / kAcross;
      const int chunk = threadIdx.x % kAcross, local = threadIdx.x / kAcross;
      const int from = k + local, n = column + chunk * 8;
      const T* own = matrix + static_cast<int64_t>(from) * args.size_n + n;
#pragma unroll
      for (int i = 0; i < kBlockK / kAtOnce; ++i) {
        const int at = i * kAtOnce;
        copy_async(to + (at + local) * kBlockN + (chunk ^ ((at + local) & 7)) * 8,
                   own + static_cast<int64_t>(at) * args.size_n,
                   n < args.size_n && from + at < args.size_k);
      }
    }
  }

  // Multiplies 16 steps of k, the `step`-th of a stage.
  __device__ void multiply_step(const Stage& stage, int step) {
    uint32_t a[kTilesM][4], b[kTilesN / 2][4];
    const int in = lane();
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) {
      const int row = (warp_m() * kTilesM + i) * 16 + in % 16, chunk = step * 2 + in / 16;
      load_matrices(a[i], stage.left + row * kBlockK + (chunk ^ (row & 7)) * 8);
    }
#pragma unroll
    for (int j = 0; j < kTilesN / 2; ++j) {
      if constexpr (kTransposed) {
        const int at = warp_n() * 64 + j * 16 + in / 16 * 8 + in % 8, chunk = step * 2 + in / 8 % 2;
        load_matrices(b[j], stage.right + at * kBlockK + (chunk ^ (at & 7)) * 8);
      } else {
        const int at = step * 16 + in % 16, chunk = warp_n() * 8 + j * 2 + in / 16;
        load_matrices_transposed(b[j], stage.right + at * kBlockN + (chunk ^ (at & 7)) * 8);
      }
    }
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
      for (int j = 0; j < kTilesN; ++j) {
        const uint32_t of_tile[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
        multiply<T>(acc[i][j], a[i], of_tile);
      }
    }
  }

  // Computes acc = left W.
  __device__ void run(const GroupedGemm& args, const ExpertTile& tile, const T* matrix,
                      bool by_token) {
    int rows[kLeftRows];
    find_rows(args, tile, by_token, rows);
    const int steps = (args.size_k + kBlockK - 1) / kBlockK;
    const auto load = [&](int step) {
      if (step < steps) {
        Stage& stage = stages()[step % kStages];
        load_left(args, tile, rows, step * kBlockK, stage.left);
        load_right(args, matrix, tile.column, step * kBlockK, stage.right);
      }
      commit_copies();
    };
#pragma unroll
    for (int step = 0; step < kStages - 1; ++step) load(step);
    for (int step = 0; step < steps; ++step) {
      wait_copies<kStages - 2>();
      __syncthreads();
      load(step + kStages - 1);
#pragma unroll
      for (int part = 0; part < kBlockK / 16; ++part) {
        multiply_step(stages()[step % kStages], part);
      }
    }
  }
};

}  // namespace moe_kernels::cuda
