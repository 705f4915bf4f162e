// A block's exclusive scan of an array of any length in shared memory; for .cu files.
#pragma once

#include "device.h"
#include "host_device.h"

namespace moe_kernels::cuda {

// All threads of the block call it; it begins and ends with a barrier. `of_warps` is scratch in
// shared memory with an entry for each warp.
template <int kThreads>
__device__ void exclusive_scan(int* values, int size, int* of_warps) {
  __syncthreads();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int mine = scan_sum(values, size, threadIdx.x, kThreads);
  int before = mine;  // plus those of earlier lanes
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const int others = __shfl_up_sync(0xffffffffu, before, lanes);
    if (lane >= lanes) before += others;
  }
  if (lane == 31) of_warps[warp] = before;
  __syncthreads();
  before -= mine;
  for (int i = 0; i < warp; ++i) before += of_warps[i];
  scan_part(values, size, before, threadIdx.x, kThreads);
  __syncthreads();
}

}  // namespace moe_kernels::cuda
