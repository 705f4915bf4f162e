// The stable counting sort of dispatch, as functions of a thread's number.
//
// All index arithmetic is here, for the device and for the host. The kernels (dispatch.cu) call
// each function from all threads of a block, with a barrier in between; a test calls them with one
// thread. Rows are cut into contiguous parts, one for each warp of each block, so that a row's
// place follows from the counts of the parts before it, in whatever order the warps run.
#pragma once

#include "host_device.h"

namespace moe_kernels::cuda {

constexpr int kWarpsOfSort = 8;
constexpr int kMaxBlocksOfSort = 128;

struct Sort {
  const int64_t* topk_ids;      // (T * K)
  const int64_t* modality_ids;  // (T), or null
  int num_rows;                 // T * K
  int top_k;
  int num_experts;
  int num_modalities;
  int rows_of_warp;
  int num_blocks;

  MOE_HOST_DEVICE int groups() const { return num_modalities + 1; }
  MOE_HOST_DEVICE int num_segments() const { return num_experts * groups(); }
  MOE_HOST_DEVICE int num_keys() const { return num_segments() + 1; }  // the last: not dispatched

  // Segment of a row; rows of padding and of ids out of range go to the tail.
  MOE_HOST_DEVICE int key(int row) const {
    const int64_t expert = topk_ids[row];
    const int64_t modality = modality_ids == nullptr ? 0 : modality_ids[row / top_k];
    const bool routed =
        expert >= 0 && expert < num_experts && modality >= 0 && modality <= num_modalities;
    return routed ? static_cast<int>(expert) * groups() + static_cast<int>(modality)
                  : num_segments();
  }

  MOE_HOST_DEVICE int first_row(int block, int warp) const {
    const int64_t row = (static_cast<int64_t>(block) * kWarpsOfSort + warp) * rows_of_warp;
    return row < num_rows ? static_cast<int>(row) : num_rows;
  }
};

inline Sort make_sort(const int64_t* topk_ids, const int64_t* modality_ids, int num_rows, int top_k,
                      int num_experts, int num_modalities) {
  constexpr int kParts = kMaxBlocksOfSort * kWarpsOfSort;
  const int rows_of_warp = num_rows == 0 ? 32 : ((num_rows + kParts - 1) / kParts + 31) / 32 * 32;
  const int rows_of_block = rows_of_warp * kWarpsOfSort;
  const int num_blocks = num_rows == 0 ? 1 : (num_rows + rows_of_block - 1) / rows_of_block;
  return {topk_ids,    modality_ids,   num_rows,     top_k,
          num_experts, num_modalities, rows_of_warp, num_blocks};
}

// For each of this thread's keys: rows in the blocks before `block`, and rows in all blocks. The
// loads of several blocks are issued together, so that a sum waits once for all of them.
MOE_HOST_DEVICE void sum_blocks(const Sort& sort, const int* counts, int block, int thread,
                                int num_threads, int* before, int* total) {
  constexpr int kAtOnce = 16;
  for (int key = thread; key < sort.num_keys(); key += num_threads) {
    int sum = 0;
    for (int first = 0; first < sort.num_blocks; first += kAtOnce) {
      int rows[kAtOnce];
      MOE_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        const int b = first + i;
        rows[i] = b < sort.num_blocks ? counts[b * sort.num_keys() + key] : 0;
      }
      MOE_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        if (first + i == block) before[key] = sum;
        sum += rows[i];
      }
    }
    total[key] = sum;
  }
}

// Replaces the rows of a key in each warp by the place of the warp's first row of that key.
MOE_HOST_DEVICE void place_warps(const Sort& sort, const int* starts, const int* before, int thread,
                                 int num_threads, int* of_warps) {
  for (int key = thread; key < sort.num_keys(); key += num_threads) {
    int place = starts[key] + before[key];
    for (int warp = 0; warp < kWarpsOfSort; ++warp) {
      int& entry = of_warps[warp * sort.num_keys() + key];
      const int rows = entry;
      entry = place;
      place += rows;
    }
  }
}

// Writes segment_offsets, expert_offsets and tokens_per_expert from the keys' starts.
MOE_HOST_DEVICE void write_offsets(const Sort& sort, const int* starts, int thread, int num_threads,
                                   int64_t* segment_offsets, int64_t* expert_offsets,
                                   int64_t* tokens_per_expert) {
  for (int key = thread; key < sort.num_keys(); key += num_threads) {
    segment_offsets[key] = starts[key];
  }
  for (int expert = thread; expert <= sort.num_experts; expert += num_threads) {
    const int first = starts[expert * sort.groups()];
    expert_offsets[expert] = first;
    if (expert < sort.num_experts) {
      tokens_per_expert[expert] = starts[(expert + 1) * sort.groups()] - first;
    }
  }
}

}  // namespace moe_kernels::cuda
