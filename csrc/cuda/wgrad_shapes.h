// What wgrad is asked for: functions of shapes alone, so that a row's bits do not depend on the
// routing. Nothing here needs CUDA.
#pragma once

#include <algorithm>
#include <cstdint>

#include "host_device.h"

namespace moe_kernels::cuda {

constexpr int64_t kTilesOfSums = 32;             // about so many in all
constexpr int64_t kLeastChunk = 512;             // rows of a tile
constexpr int64_t kMaxPartialSums = 1 << 25;     // elements of a float32 for each tile: 128 MiB
constexpr int64_t kMaxBytesOfParts = 1LL << 28;  // of du or u, by columns

// Rows of a tile for a sum over rows with `size` elements. Then one long group does not delay the
// launch, and a few groups still give many blocks. There are fewer tiles where the partial sums, up
// to two for each, would take more than 256 MiB.
inline int64_t chunk_rows(int64_t num_rows, int64_t size) {
  const int64_t tiles = std::clamp<int64_t>(kMaxPartialSums / size, 1, kTilesOfSums);
  int64_t rows = kLeastChunk;
  while (rows < num_rows / tiles) rows *= 2;
  return rows;
}

// Returns whether du (num_rows, rank) should come with dB, from rows of 16 bits. It should where
// the parts of du, one for each kColumnsOfPart of dY's columns, are not too large.
inline bool gives_du(int64_t rank, int64_t width, int64_t num_rows) {
  const int64_t parts = (width + kColumnsOfPart - 1) / kColumnsOfPart;
  return rank <= kMaxRankWithDu && 4 * parts * num_rows * rank <= kMaxBytesOfParts;
}

}  // namespace moe_kernels::cuda
