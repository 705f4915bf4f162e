// Launch of wgrad: sums of outer products over each group's rows, which are gradients of low-rank
// and added weights, with du beside dB; no torch header, so that nvcc checks it alone.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "host_device.h"
#include "scalar.h"

namespace moe_kernels::cuda {

// Number of parts of `du`, each the sum over its own columns of right.
MOE_HOST_DEVICE int wgrad_parts(int width) { return (width + kColumnsOfPart - 1) / kColumnsOfPart; }

// Sums over the rows of groups.
struct WgradProblem {
  const void* left;       // (T or T * K, height)
  const void* right;      // (T or T * K, width)
  const int64_t* tiles;   // (3, num_tiles), of `chunk` rows at most
  const int64_t* groups;  // (3, num_groups): first row, end, first partial sum
  const float* factors;   // (num_groups / groups_of_factor)
  const void* weights;    // (T, K), or null: all are 1
  const void* matrix;     // (num_groups, width, height), or null
  float* out;  // (num_groups, height, width), or (num_groups, width, height) if transposed
  float* partial;  // (partials, ...) of the same: two for every `chunk` of the T * K rows
  int64_t chunk;
  Scalar left_dtype, weights_dtype, matrix_dtype;
  int num_tiles;
  int num_groups;
  int groups_of_factor;
  int height;
  int width;
  bool transposed;
  bool left_by_token;
  bool right_by_token;
};

// Sums over rows that another launch has left in slots, see first_folded.
struct FoldedSums {
  const float* slots;  // (slots, size)
  float* out;          // (num_modalities, num_base, size)
  int64_t size;
};

struct Folded {
  FoldedSums sums[kMaxProblems];
  const int64_t* segments;  // (num_base * (num_modalities + 1) + 1 or more)
  int num_sums;
  int num_base;
  int num_modalities;
};

struct Wgrad {
  WgradProblem problems[kMaxProblems];
  Folded folded;
  const int64_t* perm;  // (T * K)
  float* du;            // (T * K, height) of the first problem, with a matrix
  float* parts;         // (wgrad_parts(width), T * K, height)
  const float* dots;    // (num_dots, T * K)
  void* sum_of_dots;    // (T * K), of dots_dtype
  int64_t num_rows;     // T * K
  Scalar dots_dtype;
  int num_problems;     // 0, 1 or 2
  int num_dots;         // 0: no sum of dots
  int top_k;
};

// Computes out[g] of each problem: the sum over the group's rows, in order, of
// (factor * weight * left)^T right; zeros for a group without rows. The rows of each tile are
// summed first, then the tiles, in order. Two launches do all: the tiles of every problem, and what
// adds their sums. The second also adds the dots, in order and in float32, and rounds their sum;
// and it adds the slots of each pair of an expert and a modality, in order.
//
// If the first problem has a matrix, du = right matrix[g] on the rows of the groups alone, reading
// `right` once for both. Then height is at most kMaxRankWithDu, and right has two-byte elements.
//
// `right` has one dtype in all problems. `left` (without a matrix), `weights` and `matrix` are
// float32 or of that dtype; factor * weight * left and the matrix are rounded to it. Any sizes and
// alignments; 16-byte rows (and pointers) are read 16 bytes at a time.
cudaError_t launch_wgrad(const Wgrad& wgrad, Scalar right, cudaStream_t stream);

}  // namespace moe_kernels::cuda
