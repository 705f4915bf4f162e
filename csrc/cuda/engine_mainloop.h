// A tile of left W on an sm_90, by a block that stays on its multiprocessor and takes one tile
// after the other. A warpgroup loads: rows of left by copies of 16 bytes, as they are scattered,
// and W by the copy engine. Two warpgroups multiply. What is loaded runs kStages steps of k ahead,
// into the next tile too: its first steps arrive while the sums of this one are stored.
//
// A tile has kBlockM rows of one expert and kWidth columns of W. If gated, half of these are
// columns of gate and half the same columns of up. Either the two warpgroups have half of the rows
// each, or (kInTurn) each has every second tile, so that one multiplies while the other stores: for
// an epilogue that takes long. The order of k is the same for every tile, and which block or
// warpgroup takes a tile changes no bit.
//
// Two blocks may form a cluster (kCluster) and take the two halves of the same 256 rows in step.
// Each loads half of W for both, so that W leaves the L2 once for 256 rows. A block without rows
// loads for the other, and multiplies zeros.
#pragma once

#include <type_traits>

#include "grouped_gemm.h"
#include "grouped_gemm_tiles.h"
#include "sm90.h"

namespace moe_kernels::cuda {

// The experts' matrices, as the copy engine takes them.
struct ExpertMaps {
  sm90::TensorMap base, extra;
};

// kTransposed, kGated: see Mainloop. kInTurn: each warpgroup has every second tile. kCluster: 1 or
// 2 blocks share what is loaded of W.
template <typename T_, bool kTransposed_, bool kGated_, bool kInTurn_, int kCluster_>
struct Engine {
  static constexpr bool kTransposed = kTransposed_, kGated = kGated_, kInTurn = kInTurn_;
  using T = T_;
  using U = std::conditional_t<kTransposed, T, float>;
  static constexpr int kCluster = kCluster_;
  static constexpr int kGroup = 128;  // threads of a warpgroup
  static constexpr int kThreads = 3 * kGroup;
  static constexpr int kTogether = kInTurn ? kGroup : 2 * kGroup;  // threads that multiply a tile
  static constexpr int kBlockM = 128, kBlockK = 64, kWidth = kInTurn ? 128 : 256;
  static constexpr int kTilesM = kInTurn ? 2 : 1, kTilesN = kWidth / 8;  // fragments of a warp
  static constexpr int kWarpsN = 1;
  static constexpr int kColumns = kGated ? kWidth / 2 : kWidth;  // of the output
  static constexpr int kWarpColumns = kColumns;
  static constexpr int kStages = kInTurn ? 5 : 4;
  // Registers of a thread, of 3 * 168 for the three groups. Two boxes of a gated matrix lie apart,
  // for which a thread that loads needs more.
  static constexpr int kToLoad = kGated ? 56 : 40, kToMultiply = (504 - kToLoad) / 2;
  // Rows of a box: of W's rows if kTransposed, else of k.
  static constexpr int kBoxRows = kTransposed ? 128 : kBlockK;
  // Boxes of a stage that a block loads.
  static constexpr int kOwnBoxes = kWidth * kBlockK / (kBoxRows * 64) / kCluster;

  struct Stage {
    T left[kBlockM * kBlockK];
    T right[kWidth * kBlockK];
  };
  struct alignas(16) Shared {
    Stage stages[kStages];
    uint64_t full[kStages];   // a stage was loaded
    uint64_t empty[kStages];  // a stage was multiplied
    uint64_t turns[2];        // a warpgroup has multiplied a tile, the even or the odd one
  };
  static_assert(kOwnBoxes * kCluster * kBoxRows * 64 == kWidth * kBlockK);

  float acc[kTilesM][kTilesN][4] = {};

  static __device__ Shared& shared() { return *reinterpret_cast<Shared*>(sm90::shared_memory()); }
  static __device__ bool loads() { return threadIdx.x < kGroup; }
  // Number of a thread among those that multiply.
  static __device__ int consumer() { return threadIdx.x - kGroup; }
  static __device__ int lane() { return threadIdx.x % 32; }
  static __device__ int warp_n() { return 0; }
  static __device__ int warp_m() { return consumer() % kTogether / 32; }
  // Shared memory of `bytes` beside the loop's, of the threads that multiply a tile.
  static __device__ void* scratch(int bytes) {
    return reinterpret_cast<unsigned char*>(&shared() + 1) + consumer() / kTogether * bytes;
  }
  // Waits for the others that multiply the tile.
  static __device__ void meet() { sm90::meet(1 + consumer() / kTogether, kTogether); }

  // Number of the block in its cluster.
  static __device__ int rank() { return kCluster == 1 ? 0 : blockIdx.x % kCluster; }

  // Leaves a tile of the map this block's rows. Without any it begins where it did: load() looks up
  // its first row.
  static __device__ void keep_own_rows(Tile& of_map) {
    if constexpr (kCluster > 1) {
      const int64_t first = of_map.first + rank() * kBlockM, end = first + kBlockM;
      const bool any = first < of_map.end;
      of_map.first = any ? first : of_map.first;
      of_map.end = !any ? of_map.first : end < of_map.end ? end : of_map.end;
    }
  }

  // See Mainloop.
  static __device__ int row_of(int i, int half) {
    return consumer() % kTogether / 32 * 16 + i * 64 + half * 8 + lane() / 4;
  }
  static __device__ int below(int i, int half) { return 64 * i + 8 * half; }
  static __device__ int column_of(int j) { return j % (kWarpColumns / 8) * 8; }
  static __device__ int64_t own(const ExpertTile& tile, int width) {
    return (tile.first + row_of(0, 0)) * width + tile.column + column_of(lane() % 4);
  }

  static __device__ void init() {
    if (threadIdx.x == 0) {
      sm90::check_swizzle(&shared());
      for (int stage = 0; stage < kStages; ++stage) {
        sm90::init_barrier(&shared().full[stage], 1 + kGroup);
        sm90::init_barrier(&shared().empty[stage], kCluster * kTogether / 32);
      }
      for (uint64_t& ended : shared().turns) sm90::init_barrier(&ended, kTogether / 32);
      sm90::fence_barriers();
    }
    if constexpr (kCluster == 1) {
      __syncthreads();
    } else {
      sm90::meet_cluster();
    }
  }

  // Starts to copy columns k, k + 1, ... of the tile's rows of left. Rows and columns that are not
  // there are zeros.
  static __device__ void load_left(const GroupedGemm& args, const ExpertTile& tile,
                                   const int (&rows)[8], int k, T* to) {
    const int chunk = threadIdx.x % 8, from = k + chunk * 8;
    int width = args.size_k;
    forget(width);  // or the compiler keeps eight addresses, and spills
    const T* left = static_cast<const T*>(args.left) + from;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int local = threadIdx.x / 8 + 16 * i;
      copy_async(to + local * kBlockK + (chunk ^ (local & 7)) * 8,
                 left + static_cast<int64_t>(rows[i]) * width,
                 local < tile.count && from < args.size_k);
    }
  }

  // Starts to copy this block's part of the expert's matrix to the cluster; elements beyond the
  // matrix' edges are zeros.
  static __device__ void load_right(const ExpertMaps& maps, const GroupedGemm& args,
                                    const ExpertTile& tile, int k, T* to, uint64_t* full) {
    const bool of_base = tile.expert < args.num_base;
    const sm90::TensorMap* map = of_base ? &maps.base : &maps.extra;
    const int depth = of_base ? tile.expert : tile.expert - args.num_base;
#pragma unroll
    for (int own = 0; own < kOwnBoxes; ++own) {
      const int i = rank() * kOwnBoxes + own;
      T* box = to + i * kBoxRows * 64;
      if constexpr (kTransposed) {
        const int row = tile.column + i * (kGated ? args.size_n : kBoxRows);
        sm90::load_box<kCluster>(map, box, k, row, depth, full);
      } else {
        sm90::load_box<kCluster>(map, box, tile.column + i * 64, k, depth, full);
      }
    }
  }

  // Loads a tile; `step` counts the steps of the block so far. By the warpgroup that loads.
  static __device__ void load(const ExpertMaps& maps, const GroupedGemm& args,
                              const ExpertTile& tile, bool by_token, int& step) {
    int rows[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int local = threadIdx.x / 8 + 16 * i;
      const int64_t row = tile.first + (local < tile.count ? local : 0);
      rows[i] = by_token ? token_of(args.perm, row, args.top_k) : static_cast<int>(row);
    }
#pragma unroll 1
    for (int k = 0; k < args.size_k; k += kBlockK, ++step) {
      const int at = step % kStages;
      Stage& stage = shared().stages[at];
      sm90::wait_barrier(&shared().empty[at], (step / kStages & 1) ^ 1);
      if (threadIdx.x == 0) {
        sm90::arrive_expecting(&shared().full[at], sizeof(stage.right));
        load_right(maps, args, tile, k, stage.right, &shared().full[at]);
      }
      load_left(args, tile, rows, k, stage.left);
      sm90::arrive_when_copied(&shared().full[at]);
    }
  }

  // Whether a tile, the block's `turn`-th, is for this warpgroup. The compiler has to see that all
  // lanes of a warp agree.
  static __device__ bool is_own(int turn) {
    return !kInTurn || turn % 2 == same_in_warp(consumer() / kGroup);
  }

  // Counts the steps of a tile that the other warpgroup multiplies.
  static __device__ void pass(const GroupedGemm& args, int& step) {
    step += (args.size_k + kBlockK - 1) / kBlockK;
  }

  // Waits until the tiles before have been multiplied: a wait for a stage tells two phases apart,
  // not three. So does this one, and a warp may be here before others of its warpgroup have ended
  // their last turn. Hence each warpgroup has a barrier, which waits for this turn of the other.
  static __device__ void begin_turn(int turn) {
    if (kInTurn) sm90::wait_barrier(&shared().turns[(turn + 1) % 2], ((turn + 1) / 2 & 1) ^ 1);
  }
  // All lanes have seen that the turn began before one ends it.
  static __device__ void end_turn(int turn) {
    if constexpr (kInTurn) __syncwarp();
    if (kInTurn && lane() == 0) sm90::arrive(&shared().turns[turn % 2]);
  }

  // Computes acc = left W of a tile. By all threads that multiply it.
  __device__ void run(const GroupedGemm& args, int& step) {
    const int rows = same_in_warp(consumer() % kTogether / kGroup) * 64;
    for (auto& sums : acc) sm90::fence_sums(sums);
    for (int k = 0; k < args.size_k; k += kBlockK, ++step) {
      const int at = step % kStages;
      const Stage& stage = shared().stages[at];
      sm90::wait_barrier(&shared().full[at], step / kStages & 1);
      sm90::fence_for_products();
      sm90::begin_products();
#pragma unroll
      for (int part = 0; part < kBlockK / 16; ++part) {
        const T* right = stage.right + part * 16 * (kTransposed ? 1 : 64);
        const uint64_t b = sm90::operand(right, kTransposed ? 16 : kBoxRows * 128);
#pragma unroll
        for (int i = 0; i < kTilesM; ++i) {
          const T* left = stage.left + (rows + 64 * i) * kBlockK + part * 16;
          sm90::multiply<T, !kTransposed>(acc[i], sm90::operand(left, 16), b);
        }
      }
      sm90::commit_products();
      sm90::wait_products<1>();
      if (k > 0) free_stage(step - 1);
    }
    sm90::wait_products<0>();
    free_stage(step - 1);
    for (auto& sums : acc) sm90::fence_sums(sums);
  }

  // Moves all sums but those of the first 32 columns in place of the ones before.
  __device__ void move_sums() {
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
      for (int j = 0; j + 4 < kTilesN; ++j) {
#pragma unroll
        for (int part = 0; part < 4; ++part) acc[i][j][part] = acc[i][j + 4][part];
      }
    }
  }

  // Waits until all that was loaded has been multiplied in the whole cluster, so that no copy
  // outlives its thread, and nothing comes to a block that has ended.
  static __device__ void drain(int step) {
    for (int i = 0; i < kStages; ++i, ++step) {
      sm90::wait_barrier(&shared().empty[step % kStages], (step / kStages & 1) ^ 1);
    }
  }

  // A product may still be reading for other warps when it is complete for one: each arrives.
  // What is next loaded into a stage comes from every block of the cluster: each is told.
  static __device__ void free_stage(int step) {
    uint64_t* empty = &shared().empty[step % kStages];
    if constexpr (kCluster == 1) {
      if (lane() == 0) sm90::arrive(empty);
    } else {
      if (lane() < kCluster) sm90::arrive_at(empty, lane());
    }
  }
};

}  // namespace moe_kernels::cuda
