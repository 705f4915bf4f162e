// Shapes that the grouped GEMMs support, and their tiles: functions of shapes alone, so that a
// row's bits do not depend on the routing. Nothing here needs CUDA.
#pragma once

#include <cstdint>
#include <limits>

#include "host_device.h"
#include "scalar.h"

namespace moe_kernels::cuda {

constexpr int kBlockN = 128;  // columns of a block of few rows, or with a long epilogue

// Rows of a tile of the map: 16, the engine's 128, or 256 for two blocks of it. Half a tile of each
// expert is empty on average, but a tile reads its expert's matrix once.
inline int grouped_gemm_block_m(int64_t num_rows, int64_t num_experts) {
  const int64_t average = num_rows / num_experts;
  return average >= 1024 ? 256 : average >= 32 ? 128 : 16;
}

// Parts of `dots` of launch_act_backward: one for each warp across a block's columns.
inline int grouped_gemm_parts(int64_t size_n, int64_t block_m) {
  return static_cast<int>((size_n + kBlockN - 1) / kBlockN) * (block_m == 16 ? 2 : 1);
}

// Parts of u2 of launch_gate_up, likewise. A block of few rows has half as many columns.
inline int gate_up_parts(int64_t size_n, int64_t block_m) {
  return grouped_gemm_parts(block_m == 16 ? 2 * size_n : size_n, block_m);
}

// Highest rank of both pairs at which dA' folds the gradients of adapters, and rows of its tiles.
constexpr int kMaxFoldedRank = 16, kFoldedRows = 128;

// First slot of the sums over the rows of a pair, which begin at sorted row `first`. Pairs are
// numbered in the order of the rows. No two share a slot: n rows lie in at most n / kFoldedRows + 2
// tiles.
MOE_HOST_DEVICE int64_t first_folded(int64_t first, int64_t pair) {
  return first / kFoldedRows + 2 * pair;
}
inline int64_t folded_slots(int64_t num_rows, int64_t num_pairs) {
  return num_rows / kFoldedRows + 2 * num_pairs;
}

// Returns whether the launches support these: bfloat16 or float16, sizes that are multiples of 8,
// and an expert's matrix of less than 2^31 elements. Moreover, left, stack, extra and outputs must
// be aligned to 16 bytes.
inline bool grouped_gemm_supports(Scalar dtype, int64_t size_k, int64_t size_n) {
  return dtype != Scalar::kFloat && size_k % 8 == 0 && size_n % 8 == 0 &&
         2 * size_k * size_n <= std::numeric_limits<int>::max();
}

}  // namespace moe_kernels::cuda
