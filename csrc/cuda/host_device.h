// What kernels share with what is compiled for the host: index arithmetic, and limits.
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

// What a block can have from sm_80 on: the least of them, sm_86 and sm_89, give 99 KiB.
constexpr size_t kMaxSharedBytes = 99 * 1024;

// Most segments, and one more for the rows that were not dispatched. A block of dispatch counts
// them for each of its warps in shared memory. That is 512 experts with three added modalities, or 128 with seventeen.
constexpr int kMaxKeys = 2400;

// Highest rank of which one pass over dY gives both dU and dB: more does not pay, and would not fit
// into the registers.
constexpr int kMaxRankWithDu = 32;

// Columns of dY of which a part of dU is the sum.
constexpr int kColumnsOfPart = 256;

// The part of `size` items that a thread scans, contiguous.
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

// values[i] becomes the sum of those before it, plus `before` of this thread's part.
MOE_HOST_DEVICE void scan_part(int* values, int size, int before, int thread, int num_threads) {
  for (int i = scan_begin(size, thread, num_threads);
       i < scan_begin(size, thread + 1, num_threads); ++i) {
    const int value = values[i];
    values[i] = before;
    before += value;
  }
}

}  // namespace moe_kernels::cuda
