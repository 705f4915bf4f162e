// Tile maps, the rows of each tile of a grouped GEMM, as functions of a thread's number, for the
// device and for the host.
//
// A tile is at most `block` rows of one group of sorted rows. A group of c rows has ceil(c / block)
// tiles; all groups together have at most num_rows / block + groups, and never more than num_rows.
// That many are written, and tiles beyond the last real one have no rows.
// moe_kernels/ops/triton_tile_maps.py makes the same maps in Triton.
#pragma once

#include "host_device.h"

namespace moe_kernels::cuda {

constexpr int kMaxMaps = 4;  // most maps of one launch

// Runs of neighbouring segments: group g begins with segment g % period * stride + g / period +
// offset and has `width` of them. The rows that were not dispatched lie behind the last segment.
struct Groups {
  int num, period, stride, offset, width;

  MOE_HOST_DEVICE int segment(int group) const {
    return group % period * stride + group / period + offset;
  }
};

struct TileMap {
  Groups groups;
  int block;
  int num_tiles;
  int64_t* tiles;  // (3, num_tiles): group, first row and end
  int64_t* rows;   // (3, groups.num): first row, end, and where partial sums of its tiles begin
};

struct TileMaps {
  int num_maps;
  TileMap maps[kMaxMaps];
};

// Offsets of the segments: 64-bit in global memory, 32-bit in a block of dispatch.
template <typename Offset>
struct Segments {
  const Offset* offsets;  // (num + 1)
  int num;
  int num_rows;

  MOE_HOST_DEVICE int64_t first(const Groups& groups, int group) const {
    return offsets[groups.segment(group)];
  }
  MOE_HOST_DEVICE int64_t end(const Groups& groups, int group) const {
    const int segment = groups.segment(group) + groups.width;
    return segment > num ? num_rows : offsets[segment];
  }
};

inline int64_t most_tiles(int64_t num_rows, int64_t num_groups, int64_t block) {
  if (num_groups == 0) return 0;
  const int64_t tiles = num_rows / block + num_groups;
  return tiles < num_rows ? tiles : num_rows;  // a tile has a row
}

// Counts the tiles of each group, and its partial sums; both are then scanned.
template <typename Offset>
MOE_HOST_DEVICE void count_tiles(const Segments<Offset>& segments, const TileMap& map, int thread,
                                 int num_threads, int* tiles, int* partials) {
  for (int group = thread; group < map.groups.num; group += num_threads) {
    const int64_t rows = segments.end(map.groups, group) - segments.first(map.groups, group);
    tiles[group] = static_cast<int>((rows + map.block - 1) / map.block);
    partials[group] = tiles[group] > 1 ? tiles[group] : 0;
  }
}

template <typename Offset>
MOE_HOST_DEVICE void write_groups(const Segments<Offset>& segments, const TileMap& map,
                                  const int* partials, int thread, int num_threads) {
  const int num = map.groups.num;
  for (int group = thread; group < num; group += num_threads) {
    map.rows[group] = segments.first(map.groups, group);
    map.rows[num + group] = segments.end(map.groups, group);
    map.rows[2 * num + group] = partials[group];
  }
}

// Finds the last group whose first tile is not after `tile`; groups in between have no tiles.
MOE_HOST_DEVICE int group_of_tile(const int* first_tiles, int num_groups, int tile) {
  int low = 0, high = num_groups;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (first_tiles[middle] <= tile ? low : high) = middle;
  }
  return low;
}

template <typename Offset>
MOE_HOST_DEVICE void write_tiles(const Segments<Offset>& segments, const TileMap& map,
                                 const int* first_tiles, int thread, int num_threads) {
  for (int tile = thread; tile < map.num_tiles; tile += num_threads) {
    const int group = group_of_tile(first_tiles, map.groups.num, tile);
    const int64_t end = segments.end(map.groups, group);
    const int64_t first = segments.first(map.groups, group) +
                          static_cast<int64_t>(tile - first_tiles[group]) * map.block;
    const bool present = first < end;
    const int64_t last = first + map.block < end ? first + map.block : end;
    map.tiles[tile] = present ? group : 0;
    map.tiles[map.num_tiles + tile] = present ? first : 0;
    map.tiles[2 * map.num_tiles + tile] = present ? last : 0;
  }
}

}  // namespace moe_kernels::cuda
