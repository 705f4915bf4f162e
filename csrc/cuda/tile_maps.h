// Launch of the tile maps' kernel; no torch header, so that nvcc checks it alone.
#pragma once

#include <cuda_runtime.h>

#include "tiles.h"

namespace moe_kernels::cuda {

// Writes every map in one launch.
cudaError_t launch_tile_maps(const Segments<int64_t>& segments, const TileMaps& maps,
                             cudaStream_t stream);

}  // namespace moe_kernels::cuda
