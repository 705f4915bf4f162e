// dispatch on CUDA: two launches, no atomics on global memory, no host synchronisation. In the
// second launch further blocks write the tile maps; they find the segments as the blocks of the
// sort do.
#include "dispatch.h"

#include <algorithm>

#include "write_maps.h"

namespace moe_kernels::cuda {
namespace {

constexpr int kThreads = 32 * kWarpsOfSort;
static_assert(kThreads == kThreadsOfMaps);

// Shared memory of a block of the second launch: the keys' starts, and scratch for sorting or for
// writing maps.
constexpr size_t bytes_of_place(int keys, int ints_of_maps) {
  const int ints_of_sort = kWarpsOfSort + (1 + kWarpsOfSort) * keys;
  return sizeof(int) * (keys + std::max(ints_of_sort, ints_of_maps));
}
static_assert(bytes_of_place(kMaxKeys, ints_of_map(kMaxKeys)) <= kMaxSharedBytes);

// Counts of each key in this block's rows. Additions of integers give the same sum in any order.
__global__ void __launch_bounds__(kThreads) count_kernel(Sort sort, int* counts) {
  auto* of_key = reinterpret_cast<int*>(shared_memory());
  for (int key = threadIdx.x; key < sort.num_keys(); key += kThreads) of_key[key] = 0;
  __syncthreads();
  const int end = sort.first_row(blockIdx.x + 1, 0);
  for (int row = sort.first_row(blockIdx.x, 0) + threadIdx.x; row < end; row += kThreads) {
    atomicAdd(&of_key[sort.key(row)], 1);
  }
  __syncthreads();
  for (int key = threadIdx.x; key < sort.num_keys(); key += kThreads) {
    counts[blockIdx.x * sort.num_keys() + key] = of_key[key];
  }
}

// Places of a warp's rows; rows with equal keys keep their order.
__device__ void place_rows(const Sort& sort, int* place_of_key, int64_t* perm, int64_t* inv_perm) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int end = sort.first_row(blockIdx.x, warp + 1);
  for (int start = sort.first_row(blockIdx.x, warp); start < end; start += 32) {
    const int row = start + lane;
    const bool active = row < end;
    const unsigned lanes = __ballot_sync(0xffffffffu, active);
    if (active) {
      const int key = sort.key(row);
      const unsigned equal = __match_any_sync(lanes, key);
      const unsigned earlier = equal & ((1u << lane) - 1u);
      const int place = place_of_key[key] + __popc(earlier);
      perm[place] = row;
      inv_perm[row] = place;
      __syncwarp(lanes);
      if (earlier == 0) place_of_key[key] += __popc(equal);
    }
    __syncwarp();
  }
}

// Finds each key's first row, and how many of its rows are in blocks before this one.
__device__ void find_starts(const Sort& sort, const int* counts, int* starts, int* before,
                            int* scratch) {
  sum_blocks(sort, counts, blockIdx.x, threadIdx.x, kThreads, before, starts);
  exclusive_scan<kThreads>(starts, sort.num_keys(), scratch);
}

__device__ void place_block(const Sort& sort, const int* starts, const int* before, int* of_warps,
                            const DispatchOut& out) {
  const int num_keys = sort.num_keys();
  const int warp = threadIdx.x / 32, end = sort.first_row(blockIdx.x, warp + 1);
  for (int row = sort.first_row(blockIdx.x, warp) + threadIdx.x % 32; row < end; row += 32) {
    atomicAdd(&of_warps[warp * num_keys + sort.key(row)], 1);
  }
  __syncthreads();
  place_warps(sort, starts, before, threadIdx.x, kThreads, of_warps);
  __syncthreads();
  place_rows(sort, of_warps + warp * num_keys, out.perm, out.inv_perm);
  if (blockIdx.x == 0) {
    write_offsets(sort, starts, threadIdx.x, kThreads, out.segment_offsets, out.expert_offsets,
                  out.tokens_per_expert);
  }
}

// Blocks of the sort, and then blocks_of_map of each map.
__global__ void __launch_bounds__(kThreads)
    place_kernel(Sort sort, const int* counts, DispatchOut out, TileMaps maps, int blocks_of_map) {
  const int num_keys = sort.num_keys(), block = static_cast<int>(blockIdx.x) - sort.num_blocks;
  auto* starts = reinterpret_cast<int*>(shared_memory());  // of each key
  int* scratch = starts + num_keys;
  int* before = scratch + kWarpsOfSort;  // rows of a key in earlier blocks
  int* of_warps = before + num_keys;     // rows of a key in each warp, then their places
  if (block < 0) {
    for (int i = threadIdx.x; i < kWarpsOfSort * num_keys; i += kThreads) of_warps[i] = 0;
  }
  find_starts(sort, counts, starts, before, scratch);
  if (block < 0) {
    place_block(sort, starts, before, of_warps, out);
  } else {
    const Segments<int> segments{starts, sort.num_segments(), sort.num_rows};
    write_map(segments, maps.maps[block / blocks_of_map], block % blocks_of_map, blocks_of_map,
              scratch);
  }
}

}  // namespace

#ifndef __CUDACC_RTC__
cudaError_t launch_dispatch(const Sort& sort, int* counts, const DispatchOut& out,
                            const TileMaps& maps, cudaStream_t stream) {
  const int keys = sort.num_keys();
  const cudaError_t error =
      launch(MOE_KERNEL(count_kernel), sort.num_blocks, kThreads, sizeof(int) * keys, stream, sort,
             counts);
  if (error != cudaSuccess) return error;
  const int of_maps = maps.num_maps == 0 ? 0 : ints_of_maps(maps), blocks = blocks_of_map(maps);
  return launch(MOE_KERNEL(place_kernel), sort.num_blocks + maps.num_maps * blocks, kThreads,
                bytes_of_place(keys, of_maps), stream, sort, counts, out, maps, blocks);
}
#endif

}  // namespace moe_kernels::cuda
