// Launch of the shrink GEMMs of adapted rows and a low-rank matrix; no torch header, so that nvcc
// checks it alone.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "scalar.h"

namespace moe_kernels::cuda {

struct Shrink {
  const void* left;      // (T, size_k) if by_token, else (T * K, size_k)
  const void* matrix;    // (M, experts_of_m, rank, size_k) if rank_first, else (..., size_k, rank)
  const int64_t* perm;   // (T * K)
  const int64_t* tiles;  // (3, num_tiles) of pairs (modality, expert), number m * num_base + expert
  const int64_t* segments;  // (num_base * (num_modalities + 1) + 1 or more), or null
  void* out;                // (T * K, rank)
  int num_tiles;
  int num_rows;  // T * K
  int num_base;
  int num_modalities;
  int experts_of_m;  // num_base, or 1: all experts share the matrix
  int size_k;
  int rank;
  int top_k;
  bool by_token;
  bool rank_first;
};

// Computes out = left M on the rows of the tiles. With `segments`, the offsets of the sorted rows'
// segments, other rows get zeros; without, they are not written.
//
// `matrix` is float32 or of left's dtype, and rounded to that; `out` float32 or of left's dtype.
// Any sizes and alignments; 16-byte rows (and pointers) are read 16 bytes at a time.
cudaError_t launch_shrink(const Shrink& shrink, Scalar left, Scalar matrix, Scalar out,
                          cudaStream_t stream);

}  // namespace moe_kernels::cuda
