// Tile maps on CUDA: a row of blocks for each map.
#include "tile_maps.h"

#include "write_maps.h"

namespace moe_kernels::cuda {
namespace {

__global__ void __launch_bounds__(kThreadsOfMaps)
    tile_maps_kernel(Segments<int64_t> segments, TileMaps args) {
  auto* scratch = reinterpret_cast<int*>(shared_memory());
  write_map(segments, args.maps[blockIdx.y], blockIdx.x, gridDim.x, scratch);
}

}  // namespace

#ifndef __CUDACC_RTC__
cudaError_t launch_tile_maps(const Segments<int64_t>& segments, const TileMaps& maps,
                             cudaStream_t stream) {
  static_assert(sizeof(int) * ints_of_map(kMaxKeys) <= kMaxSharedBytes);
  if (maps.num_maps == 0) return cudaSuccess;
  return launch(MOE_KERNEL(tile_maps_kernel), dim3(blocks_of_map(maps), maps.num_maps),
                kThreadsOfMaps, sizeof(int) * ints_of_maps(maps), stream, segments, maps);
}
#endif

}  // namespace moe_kernels::cuda
