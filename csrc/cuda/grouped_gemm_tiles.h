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

// Calls visit(modality, low, high) for the rows of each modality with an adapter in a tile.
template <typename Visit>
__device__ inline void each_modality(const GroupedGemm& args, const ExpertTile& tile, Visit visit) {
  for (int m = 0; m < args.num_modalities; ++m) {
    const int64_t* segment = args.segments + tile.expert * (args.num_modalities + 1) + m + 1;
    const int64_t low = segment[0] - tile.first, high = segment[1] - tile.first;
    if (low >= high || low >= tile.count || high <= 0) continue;
    visit(m, static_cast<int>(low < 0 ? 0 : low),
          static_cast<int>(high < tile.count ? high : tile.count));
  }
}

// Returns matrix number `modality` for a tile's expert, of (num_modalities, experts, size).
template <typename V>
__device__ inline const V* matrix_for(const void* stack, const ExpertTile& tile, int modality,
                                      int experts, int64_t size) {
  const int64_t index = static_cast<int64_t>(modality) * experts + (experts == 1 ? 0 : tile.expert);
  return static_cast<const V*>(stack) + index * size;
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

// Loads four neighbours of a row of `size` from k on, zeros beyond it. `vectors`: rows consist of
// whole vectors.
__device__ inline float4 four(const float* row, int k, int size, bool vectors) {
  if (vectors && k < size) return *reinterpret_cast<const float4*>(row + k);
  return {k < size ? row[k] : 0.0f, k + 1 < size ? row[k + 1] : 0.0f,
          k + 2 < size ? row[k + 2] : 0.0f, k + 3 < size ? row[k + 3] : 0.0f};
}
template <typename T>
__device__ inline float4 four(const T* row, int k, int size, bool vectors) {
  if (vectors && k < size) {
    const uint2 words = *reinterpret_cast<const uint2*>(row + k);
    const float2 low = unpack<T>(words.x), high = unpack<T>(words.y);
    return {low.x, low.y, high.x, high.y};
  }
  return {k < size ? to_float(row[k]) : 0.0f, k + 1 < size ? to_float(row[k + 1]) : 0.0f,
          k + 2 < size ? to_float(row[k + 2]) : 0.0f, k + 3 < size ? to_float(row[k + 3]) : 0.0f};
}

// Stores them likewise.
template <typename T>
__device__ inline void store_four(T* row, int k, int size, bool vectors, const float4& values) {
  if (vectors) {
    if (k >= size) return;
    if constexpr (sizeof(T) == sizeof(float)) {
      *reinterpret_cast<float4*>(row + k) = values;
    } else {
      *reinterpret_cast<uint2*>(row + k) = {pack<T>(values.x, values.y),
                                            pack<T>(values.z, values.w)};
    }
    return;
  }
  if (k < size) row[k] = from_float<T>(values.x);
  if (k + 1 < size) row[k + 1] = from_float<T>(values.y);
  if (k + 2 < size) row[k + 2] = from_float<T>(values.z);
  if (k + 3 < size) row[k + 3] = from_float<T>(values.w);
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

// Writes the words, or zeros.
template <typename T>
__device__ inline void write_words(T* to, const uint32_t (&words)[4], bool present) {
  *reinterpret_cast<uint4*>(to) =
      present ? uint4{words[0], words[1], words[2], words[3]} : uint4{};
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
