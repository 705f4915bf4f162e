// dispatch on CUDA: two launches, no atomics on global memory, no wait for the host.
#include <cub/block/block_scan.cuh>

#include "counting_sort.h"
#include "dispatch.h"

namespace moe_kernels::cuda {
namespace {

constexpr int kThreads = 32 * kWarpsOfSort;

using BlockScan = cub::BlockScan<int, kThreads>;

// Counts of each key in this block's rows. Additions of integers give the same sum in any order.
__global__ void __launch_bounds__(kThreads) count_kernel(Sort sort, int* counts) {
  extern __shared__ int of_key[];
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

__device__ void exclusive_scan(int* values, int size, BlockScan::TempStorage& storage) {
  __syncthreads();
  int before;
  BlockScan(storage).ExclusiveSum(scan_sum(values, size, threadIdx.x, kThreads), before);
  __syncthreads();
  scan_part(values, size, before, threadIdx.x, kThreads);
  __syncthreads();
}

// The places of a warp's rows: those of equal keys in the order of the rows.
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

__device__ void make_tiles(const Sort& sort, const TileMap& map, const int* starts, int* scratch,
                           BlockScan::TempStorage& storage, int64_t* out) {
  if (out == nullptr) return;
  count_tiles(sort, map, starts, threadIdx.x, kThreads, scratch);
  exclusive_scan(scratch, map.num_groups(sort), storage);
  write_tiles(sort, map, starts, scratch, blockIdx.x * kThreads + threadIdx.x,
              gridDim.x * kThreads, out);
  __syncthreads();
}

__global__ void __launch_bounds__(kThreads)
    place_kernel(Sort sort, const int* counts, DispatchOut out, TileMap experts, TileMap adapted) {
  extern __shared__ int shared[];
  __shared__ BlockScan::TempStorage storage;
  const int num_keys = sort.num_keys();
  int* starts = shared;                   // of each key
  int* before = starts + num_keys;        // rows of a key in earlier blocks; then scratch
  int* of_warps = before + num_keys + 1;  // rows of a key in each warp, then their places
  for (int i = threadIdx.x; i < kWarpsOfSort * num_keys; i += kThreads) of_warps[i] = 0;
  sum_blocks(sort, counts, blockIdx.x, threadIdx.x, kThreads, before, starts);
  exclusive_scan(starts, num_keys, storage);

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
  make_tiles(sort, experts, starts, before, storage, out.expert_tiles);
  make_tiles(sort, adapted, starts, before, storage, out.adapted_tiles);
}

}  // namespace

size_t dispatch_shared_bytes(const Sort& sort) {
  return sizeof(int) * ((2 + kWarpsOfSort) * static_cast<size_t>(sort.num_keys()) + 1);
}

cudaError_t launch_dispatch(const Sort& sort, int* counts, const DispatchOut& out,
                            const TileMap& experts, const TileMap& adapted, cudaStream_t stream) {
  const size_t bytes = dispatch_shared_bytes(sort);
  if (bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(
        place_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    if (error != cudaSuccess) return error;
  }
  count_kernel<<<sort.num_blocks, kThreads, sizeof(int) * sort.num_keys(), stream>>>(sort, counts);
  place_kernel<<<sort.num_blocks, kThreads, bytes, stream>>>(sort, counts, out, experts, adapted);
  return cudaGetLastError();
}

}  // namespace moe_kernels::cuda
