// Index arithmetic and limits, for kernels and for the host.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#define MOE_HOST_DEVICE __host__ __device__ __forceinline__
#define MOE_UNROLL _Pragma("unroll")
#else
#define MOE_HOST_DEVICE inline
#define MOE_UNROLL
#endif

namespace moe_kernels::cuda {

// Shared memory of a block from sm_80 on: sm_86 and sm_89 have the least, 99 KiB.
constexpr size_t kMaxSharedBytes = 99 * 1024;

// Limit on segments, plus one for the rows that were not dispatched. A block of dispatch counts
// them for each of its warps in shared memory. It allows 512 experts with three added modalities,
// or 128 with seventeen.
constexpr int kMaxKeys = 2400;

// Highest rank at which one pass over dY gives both du and dB: above it the pass does not pay, and
// its sums do not fit into the registers.
constexpr int kMaxRankWithDu = 32;

// Sums over rows, problems, of one launch of wgrad.
constexpr int kMaxProblems = 2;

// Columns of dY that are summed in one part of du.
constexpr int kColumnsOfPart = 256;

// First of the contiguous items, of `size`, that a thread scans.
MOE_HOST_DEVICE int scan_begin(int size, int thread, int num_threads) {
  return static_cast<int>(static_cast<int64_t>(size) * thread / num_threads);
}

MOE_HOST_DEVICE int scan_sum(const int* values, int size, int thread, int num_threads) {
  int sum = 0;
  for (int i = scan_begin(size, thread, num_threads);
       i < scan_begin(size, thread + 1, num_threads); ++i) {
    sum += values[i];
  }
  return sum;
}

// Replaces values[i] by the sum of the thread's earlier values plus `before`.
MOE_HOST_DEVICE void scan_part(int* values, int size, int before, int thread, int num_threads) {
  for (int i = scan_begin(size, thread, num_threads);
       i < scan_begin(size, thread + 1, num_threads); ++i) {
    const int value = values[i];
    values[i] = before;
    before += value;
  }
}

}  // namespace moe_kernels::cuda
