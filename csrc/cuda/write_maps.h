// Tile maps as blocks write them: those of a launch of their own (tile_maps.cu), or of dispatch's
// second (dispatch.cu); for .cu files.
#pragma once

#include <algorithm>

#include "block_scan.h"
#include "tiles.h"

namespace moe_kernels::cuda {

constexpr int kThreadsOfMaps = 256;

// Blocks for each map: each scans all groups, and writes a share of the tiles.
inline int blocks_of_map(const TileMaps& given) {
  constexpr int kTilesOfBlock = 4 * kThreadsOfMaps, kMaxBlocks = 16;
  int tiles = 1;
  for (int i = 0; i < given.num_maps; ++i) tiles = std::max(tiles, given.maps[i].num_tiles);
  return std::min(kMaxBlocks, ceil_div(tiles, kTilesOfBlock));
}

// Shared memory that a block scans in, for a map of so many groups.
constexpr int ints_of_map(int groups) { return 2 * groups + kThreadsOfMaps / 32; }

inline int ints_of_maps(const TileMaps& given) {
  int groups = 0;
  for (int i = 0; i < given.num_maps; ++i) groups = std::max(groups, given.maps[i].groups.num);
  return ints_of_map(groups);
}

// All threads of the block call it, which is number `block` of `num_blocks` for this map. It begins
// without a barrier: the offsets are to be there.
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
