// Launch that adds a low-rank term to adapted rows in place; no torch header, so that nvcc checks
// it alone.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "scalar.h"

namespace moe_kernels::cuda {

struct AddLowRank {
  const void* u;         // (T, rank), sorted rows, not scaled: of out's dtype if rank_last, else
                         // float32
  const void* v;         // (M, width, rank) if rank_last, else (M, rank, width)
  const float* scaling;  // (M)
  const int64_t* perm;   // (T), the token of a row
  const int64_t* tiles;  // (3, num_tiles) of modalities
  void* out;             // (T, width), by token
  int num_tiles;
  int rank;
  int width;
  bool rank_last;
};

// Returns whether the launch below supports these: bfloat16 or float16, and a width that is a
// multiple of 8. Moreover, out must be aligned to 16 bytes.
bool add_low_rank_supports(Scalar out, int64_t width);

// Adds s u V to out[token] on the rows of the tiles alone. s u is rounded to out's dtype, and so is
// v, which is float32 or of out's dtype.
cudaError_t launch_add_low_rank(const AddLowRank& args, Scalar out, Scalar v, cudaStream_t stream);

}  // namespace moe_kernels::cuda
