// Tiles of the grouped GEMMs, and how a warp moves what it holds of one.
#pragma once

#include "device.h"
#include "grouped_gemm.h"

namespace moe_kernels::cuda {

constexpr int kGroupM = 8;  // row tiles that use the same weights one after the other

// Rows of one expert, and columns of its matrix.
struct ExpertTile {
  int expert;
  int64_t first;  // row
  int count;      // of rows
  int base;       // rows before the first adapted one
  int column;     // of the output
  int part;       // number of the columns' tile
};

// Rows that come before the first adapted one of a tile.
__device__ inline int base_rows(const GroupedGemm& args, const ExpertTile& tile) {
  if (args.rank == 0 || tile.expert >= args.num_base) return tile.count;
  const int64_t end = args.segments[tile.expert * (args.num_modalities + 1) + 1] - tile.first;
  return static_cast<int>(end < 0 ? 0 : end < tile.count ? end : tile.count);
}

// Row and column tile number `id`. kGroupM row tiles share their weights' tiles in the L2.
__device__ inline int2 tile_ids(int id, int num_tiles_m, int num_tiles_n) {
  const int per_group = kGroupM * num_tiles_n;
  const int first = id / per_group * kGroupM;
  const int size = num_tiles_m - first < kGroupM ? num_tiles_m - first : kGroupM;
  return {first + id % per_group % size, id % per_group / size};
}

// Returns columns `column_tile` of a tile of the map that has rows.
__device__ inline ExpertTile expert_tile(const GroupedGemm& args, const Tile& of_map,
                                         int column_tile, int columns) {
  ExpertTile tile{static_cast<int>(of_map.group), of_map.first,
                  static_cast<int>(of_map.end - of_map.first), 0, column_tile * columns,
                  column_tile};
  tile.base = base_rows(args, tile);
  return tile;
}

// Transposes the 4 x 4 words of the four lanes that share a fragment's row: word j of lane c goes
// to word c of lane j. Two columns of each of four fragments become eight neighbours.
__device__ inline void transpose_quad(uint32_t (&words)[4]) {
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2) {
    const bool second = (threadIdx.x & bit) != 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t& low = words[bit == 1 ? 2 * i : i];
      uint32_t& high = words[bit == 1 ? 2 * i + 1 : i + 2];
      const uint32_t got = __shfl_xor_sync(0xffffffffu, second ? low : high, bit);
      (second ? low : high) = got;
    }
  }
}

template <typename T>
__device__ inline void store_words(T* to, const uint32_t (&words)[4]) {
  *reinterpret_cast<uint4*>(to) = {words[0], words[1], words[2], words[3]};
}

template <typename T>
__device__ inline void load_words(const T* from, uint32_t (&words)[4]) {
  const uint4 loaded = *reinterpret_cast<const uint4*>(from);
  words[0] = loaded.x;
  words[1] = loaded.y;
  words[2] = loaded.z;
  words[3] = loaded.w;
}

// Of memory that the kernel does not write.
template <typename T>
__device__ inline void load_words_once(const T* from, uint32_t (&words)[4]) {
  const uint4 loaded = load_once(from);
  words[0] = loaded.x;
  words[1] = loaded.y;
  words[2] = loaded.z;
  words[3] = loaded.w;
}

}  // namespace moe_kernels::cuda
