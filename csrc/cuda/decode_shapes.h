// Shapes that the kernels of decoding take: functions of shapes alone, so that a row's bits do not
// depend on the routing. Nothing here needs CUDA.
#pragma once

#include <cstdint>
#include <limits>

#include "host_device.h"

namespace moe_kernels::cuda {

// A tile of the matrix instructions has 16 rows. With so few tokens it holds all rows of an expert,
// so that each weight is read once (unless a token names an expert twice).
constexpr int kMaxDecodeTokens = 16;
// Tokens times top-k: each has a thread that looks for the others of its expert.
constexpr int kMaxDecodeRows = 128;
constexpr int kMaxDecodeRank = 64;

constexpr int kDecodeColumns = 32;  // columns of the activation in a block

// Blocks of columns of the activation. Each sums a part of u2.
MOE_HOST_DEVICE int64_t decode_parts(int64_t inter) {
  return (inter + kDecodeColumns - 1) / kDecodeColumns;
}

// Returns whether launch_decode takes these sizes; `rank` is the higher one, 0 without adapters.
inline bool decode_takes(int64_t tokens, int64_t top_k, int64_t hidden, int64_t inter,
                         int64_t rank) {
  constexpr int64_t kMost = std::numeric_limits<int>::max();
  return tokens <= kMaxDecodeTokens && top_k >= 1 && tokens * top_k <= kMaxDecodeRows &&
         hidden >= 8 && inter >= 8 && hidden % 8 == 0 && inter % 8 == 0 &&
         hidden <= kMost / kMaxDecodeRows && inter <= kMost / kMaxDecodeRows &&
         rank <= kMaxDecodeRank;
}

}  // namespace moe_kernels::cuda
