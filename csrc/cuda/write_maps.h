// Writes tile maps by blocks, in a separate launch (tile_maps.cu) or in dispatch's second launch
// (dispatch.cu); for .cu files.
#pragma once

#include <algorithm>

#include "block_scan.h"
#include "tiles.h"

namespace moe_kernels::cuda {

constexpr int kThreadsOfMaps = 256;

// Blocks for each map. Each block scans all groups and writes a share of the tiles.
inline int blocks_of_map(const TileMaps& args) {
  constexpr int kTilesOfBlock = 4 * kThreadsOfMaps, kMaxBlocks = 16;
  int tiles = 1;
  for (int i = 0; i < args.num_maps; ++i) tiles = std::max(tiles, args.maps[i].num_tiles);
  return std::min(kMaxBlocks, ceil_div(tiles, kTilesOfBlock));
}

// Ints of shared memory in which a block scans a map of so many groups.
constexpr int ints_of_map(int groups) { return 2 * groups + kThreadsOfMaps / 32; }

inline int ints_of_maps(const TileMaps& args) {
  int groups = 0;
  for (int i = 0; i < args.num_maps; ++i) groups = std::max(groups, args.maps[i].groups.num);
  return ints_of_map(groups);
}

// All threads of block number `block` of `num_blocks` for this map call it. It begins without a
// barrier, so the offsets must have been written before.
template <typename Offset>
__device__ void write_map(const Segments<Offset>& segments, const TileMap& map, int block,
                          int num_blocks, int* tiles) {
  int *partials = tiles + map.groups.num, *scratch = partials + map.groups.num;
  count_tiles(segments, map, threadIdx.x, kThreadsOfMaps, tiles, partials);
  exclusive_scan<kThreadsOfMaps>(tiles, map.groups.num, scratch);
  write_tiles(segments, map, tiles, block * kThreadsOfMaps + threadIdx.x,
              num_blocks * kThreadsOfMaps);
  if (block == 0) {
    exclusive_scan<kThreadsOfMaps>(partials, map.groups.num, scratch);
    write_groups(segments, map, partials, threadIdx.x, kThreadsOfMaps);
  }
}

}  // namespace moe_kernels::cuda
