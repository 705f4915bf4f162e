// Memory of the CPU ops: all of it is allocated here.
#pragma once

#include <ATen/core/Tensor.h>

namespace moe_kernels::cpu {

// With poison on, new memory is filled with NaN or, for integers, with -(2^62), so that an
// unwritten element shows in a test.
void set_poison(bool on);

at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype);

// Writes zeros into rows [begin, end) of a tensor that has them; one without rows stays as it is.
void zero_rows(const at::Tensor& tensor, int64_t begin, int64_t end);

}  // namespace moe_kernels::cpu
