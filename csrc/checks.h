// Checks that every op makes before it touches memory. Python's checks have friendlier messages;
// these keep a direct call through torch.ops from reading out of bounds.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <vector>

namespace moe_kernels {

// A size of -1 matches any.
inline void check_shape(const at::Tensor& tensor, const char* name,
                        std::initializer_list<int64_t> sizes) {
  const at::IntArrayRef expected(sizes.begin(), sizes.size());
  bool same = tensor.dim() == static_cast<int64_t>(expected.size());
  for (size_t i = 0; same && i < expected.size(); ++i) {
    same = expected[i] == -1 || tensor.size(static_cast<int64_t>(i)) == expected[i];
  }
  TORCH_CHECK(same, name, " must have shape ", expected, " (-1: any), has ", tensor.sizes());
}

inline void check_layout(const at::Tensor& tensor, const char* name, at::ScalarType dtype,
                         std::initializer_list<int64_t> sizes) {
  TORCH_CHECK(tensor.scalar_type() == dtype, name, " must be ", dtype, ", is ",
              tensor.scalar_type());
  check_shape(tensor, name, sizes);
  TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
}

// Checks a tensor of an op on the CPU.
inline void check_tensor(const at::Tensor& tensor, const char* name, at::ScalarType dtype,
                         std::initializer_list<int64_t> sizes) {
  TORCH_CHECK(tensor.defined() && tensor.is_cpu(), name, " must be a CPU tensor");
  check_layout(tensor, name, dtype, sizes);
}

// Returns whether a stack (n, rows, columns) is a view of one that is stored (n, columns, rows).
inline bool is_transposed(const at::Tensor& stack) {
  return stack.dim() == 3 && !stack.is_contiguous() && stack.transpose(1, 2).is_contiguous();
}

// Checks a stack of an op on the CPU, which is stored as it is or transposed.
inline void check_stack(const at::Tensor& stack, const char* name, at::ScalarType dtype,
                        std::initializer_list<int64_t> sizes, bool transposed) {
  TORCH_CHECK(stack.defined() && stack.is_cpu(), name, " must be a CPU tensor");
  TORCH_CHECK(stack.scalar_type() == dtype, name, " must be ", dtype, ", is ",
              stack.scalar_type());
  check_shape(stack, name, sizes);
  TORCH_CHECK((transposed ? stack.transpose(1, 2) : stack).is_contiguous(), name, " must be ",
              transposed ? "a transposed view of a contiguous stack" : "contiguous");
}

// Checks a tensor of an op on any device: it must be on the device of the op's first tensor.
inline void check_like(const at::Tensor& first, const at::Tensor& tensor, const char* name,
                       at::ScalarType dtype, std::initializer_list<int64_t> sizes) {
  TORCH_CHECK(tensor.device() == first.device(), name, " must be on ", first.device(), ", is on ",
              tensor.device());
  check_layout(tensor, name, dtype, sizes);
}

// An adapter may be stored in float32 beside operands of lower precision.
inline void check_adapter(const at::Tensor& tensor, const char* name, at::ScalarType dtype,
                          std::initializer_list<int64_t> sizes) {
  const bool wide = tensor.scalar_type() == at::kFloat && dtype != at::kDouble;
  check_tensor(tensor, name, wide ? at::kFloat : dtype, sizes);
}

inline void check_together(const std::optional<at::Tensor>& a, const char* a_name,
                           const std::optional<at::Tensor>& b, const char* b_name) {
  TORCH_CHECK(a.has_value() == b.has_value(), a_name, " and ", b_name,
              " must be given together or not at all");
}

// The compute dtypes: float32, float64, bfloat16, float16.
inline void check_compute_dtype(const at::Tensor& tensor, const char* name) {
  const at::ScalarType dtype = tensor.scalar_type();
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 ||
                  dtype == at::kHalf,
              name, " must be float32, float64, bfloat16 or float16, is ", dtype);
}

inline void check_offsets(const at::Tensor& offsets, const char* name, int64_t num_rows) {
  const int64_t* values = offsets.const_data_ptr<int64_t>();
  const int64_t count = offsets.numel();
  bool valid = values[0] == 0 && values[count - 1] <= num_rows;
  for (int64_t i = 1; valid && i < count; ++i) valid = values[i] >= values[i - 1];
  TORCH_CHECK(valid, name, " must start at 0, not decrease, and not pass the ", num_rows, " rows");
}

inline void check_topk_ids(const at::Tensor& topk_ids, int64_t num_experts) {
  check_tensor(topk_ids, "topk_ids", at::kLong, {-1, -1});
  if (topk_ids.numel() == 0) return;
  const int64_t* values = topk_ids.const_data_ptr<int64_t>();
  const auto [low, high] = std::minmax_element(values, values + topk_ids.numel());
  TORCH_CHECK_VALUE(*low >= 0 && *high < num_experts, "topk_ids must be in 0..", num_experts - 1,
                    ", got ", *low, "..", *high);
}

// Checks that the rows of each segment are in the order of their slots.
inline void check_ascending(const at::Tensor& perm, const char* name, const at::Tensor& offsets) {
  const int64_t* values = perm.const_data_ptr<int64_t>();
  const int64_t* bounds = offsets.const_data_ptr<int64_t>();
  bool valid = true;
  for (int64_t s = 0; s + 1 < offsets.numel(); ++s) {
    for (int64_t p = bounds[s] + 1; p < bounds[s + 1]; ++p) valid &= values[p - 1] < values[p];
  }
  TORCH_CHECK(valid, name, " must ascend within each segment");
}

inline void check_permutation(const at::Tensor& perm, const char* name) {
  const int64_t* values = perm.const_data_ptr<int64_t>();
  const int64_t count = perm.numel();
  std::vector<char> seen(count, 0);
  bool valid = true;
  for (int64_t p = 0; valid && p < count; ++p) {
    valid = values[p] >= 0 && values[p] < count && !seen[values[p]];
    if (valid) seen[values[p]] = 1;
  }
  TORCH_CHECK(valid, name, " must be a permutation of 0..", count - 1);
}

}  // namespace moe_kernels
