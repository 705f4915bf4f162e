// The dtypes that the CUDA kernels know.
#pragma once

namespace moe_kernels::cuda {

enum class Scalar { kFloat, kHalf, kBFloat16 };

}  // namespace moe_kernels::cuda
