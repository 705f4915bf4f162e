// Tile maps on CUDA: a row of blocks for each map, each of which scans all groups and writes a share.
#include <algorithm>

#include "block_scan.h"
#include "tile_maps.h"

namespace moe_kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTilesOfBlock = 4 * kThreads;
constexpr int kMaxBlocks = 16;

__global__ void __launch_bounds__(kThreads) tile_maps_kernel(TileMaps given) {
  const TileMap& map = given.maps[blockIdx.y];
  auto* tiles = reinterpret_cast<int*>(shared_memory());
  int *slots = tiles + map.groups.num, *scratch = slots + map.groups.num;
  count_tiles(given, map, threadIdx.x, kThreads, tiles, slots);
  exclusive_scan<kThreads>(tiles, map.groups.num, scratch);
  write_tiles(given, map, tiles, blockIdx.x * kThreads + threadIdx.x, gridDim.x * kThreads);
  if (blockIdx.x == 0) {
    exclusive_scan<kThreads>(slots, map.groups.num, scratch);
    write_groups(given, map, slots, threadIdx.x, kThreads);
  }
}

}  // namespace

cudaError_t launch_tile_maps(const TileMaps& maps, cudaStream_t stream) {
  if (maps.num_maps == 0) return cudaSuccess;
  int tiles = 1, groups = 0;
  for (int i = 0; i < maps.num_maps; ++i) {
    tiles = std::max(tiles, maps.maps[i].num_tiles);
    groups = std::max(groups, maps.maps[i].groups.num);
  }
  const int blocks = std::min(kMaxBlocks, ceil_div(tiles, kTilesOfBlock));
  return launch(tile_maps_kernel, dim3(blocks, maps.num_maps), kThreads,
                sizeof(int) * (2 * groups + kThreads / 32), stream, maps);
}

}  // namespace moe_kernels::cuda
