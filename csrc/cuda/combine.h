// Launch of the combine kernel; no torch header, so that nvcc checks it alone.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "scalar.h"

namespace moe_kernels::cuda {

struct Combine {
  const void* rows;         // (T * K, width), sorted
  const int64_t* inv_perm;  // (T * K)
  const int64_t* num_rows;  // (1): rows from here on were not dispatched
  const void* weights;      // (T, K), or null: all are 1
  void* out;                // (T, width)
  int64_t num_tokens;
  int width;
  int top_k;
};

// Rows must begin at, and have a length of, a multiple of 16 bytes. There must be an element.
// out[t] = sum over k, in order, of weights[t, k] * the row of (t, k), in float32.
cudaError_t launch_combine(const Combine& combine, Scalar rows, Scalar weights,
                           cudaStream_t stream);

}  // namespace moe_kernels::cuda
