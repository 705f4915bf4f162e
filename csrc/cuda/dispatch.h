// Launches of dispatch; no torch header, so that nvcc checks them alone.
#pragma once

#include <cuda_runtime.h>

#include "counting_sort.h"
#include "tiles.h"

namespace moe_kernels::cuda {

struct DispatchOut {
  int64_t* perm;               // (T * K)
  int64_t* inv_perm;           // (T * K)
  int64_t* tokens_per_expert;  // (E)
  int64_t* expert_offsets;     // (E + 1)
  int64_t* segment_offsets;    // (E * (M + 1) + 1)
};

// Sorts, and writes every map of the segments, in two launches. `counts` is scratch of
// sort.num_blocks * sort.num_keys() ints.
cudaError_t launch_dispatch(const Sort& sort, int* counts, const DispatchOut& out,
                            const TileMaps& maps, cudaStream_t stream);

}  // namespace moe_kernels::cuda
