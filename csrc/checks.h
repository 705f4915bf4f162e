// Checks that every op makes before it touches memory. Python's checks have friendlier messages;
// these keep a direct call through torch.ops from reading out of bounds.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <string>
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

// Checks a tensor that is float32 or has the dtype of the operands that it is multiplied with, as
// what trains may be wider than what is frozen. float64 has nothing wider.
inline void check_float_or(at::ScalarType dtype, const at::Tensor& first, const at::Tensor& tensor,
                           const char* name, std::initializer_list<int64_t> sizes) {
  const bool wide = tensor.scalar_type() == at::kFloat && dtype != at::kDouble;
  check_like(first, tensor, name, wide ? at::kFloat : dtype, sizes);
}

// Returns whether a tensor begins at a multiple of 16 bytes; one without memory does.
inline bool is_aligned(const at::Tensor& tensor) {
  return tensor.is_meta() || reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
}

// Kernels load 16 bytes at once.
inline void check_vectors(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK(is_aligned(tensor) && tensor.size(-1) * tensor.element_size() % 16 == 0, name,
              " must begin at, and have rows of, a multiple of 16 bytes");
}

inline void check_together(const std::optional<at::Tensor>& a, const char* a_name,
                           const std::optional<at::Tensor>& b, const char* b_name) {
  TORCH_CHECK(a.has_value() == b.has_value(), a_name, " and ", b_name,
              " must be given together or not at all");
}

// Matrices of a frozen stack, unpacked.
struct MatricesOf {
  int64_t experts, out, in;
};

// Checks a low-rank pair beside a frozen stack. Returns its number of modalities, 0 without it.
inline int64_t check_pair(const at::Tensor& first, at::ScalarType dtype, const MatricesOf& stack,
                          const std::optional<at::Tensor>& a, const std::optional<at::Tensor>& b,
                          const std::optional<at::Tensor>& scaling, const std::string& name) {
  const std::string of_a = name + "_lora_A";
  TORCH_CHECK(a.has_value() == b.has_value() && a.has_value() == scaling.has_value(), name,
              "_lora_A, _lora_B and _scaling must be given together or not at all");
  if (!a) return 0;
  check_float_or(dtype, first, *a, of_a.c_str(), {-1, -1, -1, stack.in});
  const int64_t modalities = a->size(0), rank = a->size(2);
  TORCH_CHECK(a->size(1) == stack.experts || a->size(1) == 1, of_a, " must be of ", stack.experts,
              " experts, or of 1 that all share, is of ", a->size(1));
  TORCH_CHECK(modalities >= 1 && rank >= 1, of_a, " must have a modality and a rank, is ",
              a->sizes());
  check_like(first, *b, (name + "_lora_B").c_str(), a->scalar_type(),
             {modalities, stack.experts, stack.out, rank});
  check_like(first, *scaling, (name + "_scaling").c_str(), at::kFloat, {modalities});
  return modalities;
}

// Checks the shapes with which a layer's arguments fit each other before anything is sorted.
inline void check_routed(const at::Tensor& hidden_states, const at::Tensor& topk_ids,
                         const at::Tensor& topk_weights, const at::Tensor& gate_up_proj,
                         const at::Tensor& down_proj,
                         const std::optional<at::Tensor>& extra_gate_up_proj,
                         const std::optional<at::Tensor>& extra_down_proj) {
  check_shape(hidden_states, "hidden_states", {-1, -1});
  check_shape(topk_ids, "topk_ids", {hidden_states.size(0), -1});
  check_shape(topk_weights, "topk_weights", {topk_ids.size(0), topk_ids.size(1)});
  check_shape(gate_up_proj, "gate_up_proj", {-1, -1, -1});
  check_shape(down_proj, "down_proj", {gate_up_proj.size(0), -1, -1});
  check_together(extra_gate_up_proj, "extra_gate_up_proj", extra_down_proj, "extra_down_proj");
  if (!extra_gate_up_proj) return;
  check_shape(*extra_gate_up_proj, "extra_gate_up_proj", {-1, -1, -1});
  check_shape(*extra_down_proj, "extra_down_proj", {-1, -1, -1});
  TORCH_CHECK(extra_gate_up_proj->size(0) == extra_down_proj->size(0),
              "both projections must have the same number of added experts, have ",
              extra_gate_up_proj->size(0), " and ", extra_down_proj->size(0));
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
