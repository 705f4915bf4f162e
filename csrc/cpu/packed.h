// Frozen stacks of experts that stay packed, and are unpacked in pieces as products need them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "gemm.h"

namespace moe_kernels::cpu {

enum class Packing { none, nf4, fp8 };

constexpr int64_t kFp8Block = 128;  // rows, and columns, that share a scale

// A stack of matrices (rows, columns), one for each expert.
struct PackedStack {
  Packing packing = Packing::none;
  const uint8_t* data = nullptr;
  const float* scales = nullptr;
  int64_t rows = 0, columns = 0;
  int64_t block = 0;  // of nf4: weights of the flattened stack with one scale

  // Writes `count` rows from `row` on, `n` columns of each from `column` on, side by side. Both are
  // even for nf4.
  template <typename scalar_t>
  void unpack(int64_t expert, int64_t row, int64_t count, int64_t column, int64_t n,
              scalar_t* to) const {
    for (int64_t i = 0; i < count; ++i) unpack_row(expert, row + i, column, n, to + i * n);
  }

 private:
  template <typename scalar_t>
  void unpack_row(int64_t expert, int64_t row, int64_t column, int64_t n, scalar_t* to) const {
    const auto& kernel = kernels<scalar_t>();
    const int64_t first = (expert * rows + row) * columns + column;
    const bool fp8 = packing == Packing::fp8;
    const int64_t wide = (columns + kFp8Block - 1) / kFp8Block;
    const int64_t high = (rows + kFp8Block - 1) / kFp8Block;
    const float* of_row = scales + (expert * high + row / kFp8Block) * wide;
    for (int64_t i = 0; i < n;) {
      if (fp8) {
        const int64_t run = std::min(kFp8Block - (column + i) % kFp8Block, n - i);
        kernel.unpack_fp8(data + first + i, of_row[(column + i) / kFp8Block], to + i, run);
        i += run;
      } else {
        const int64_t run = std::min(block - ((first + i) & (block - 1)), n - i);
        kernel.unpack_nf4(data + (first + i) / 2, scales[(first + i) / block], to + i, run);
        i += run;
      }
    }
  }
};

}  // namespace moe_kernels::cpu
