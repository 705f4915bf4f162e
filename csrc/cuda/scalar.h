// Dtypes of the CUDA kernels.
#pragma once

namespace moe_kernels::cuda {

enum class Scalar { kFloat, kHalf, kBFloat16 };

}  // namespace moe_kernels::cuda
