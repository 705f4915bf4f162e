// Low-rank adapters and their gradients, shared by the ops.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "../checks.h"
#include "products.h"

namespace moe_kernels::cpu {

// One projection's adapters: lora_A (M, E or 1, r, in), lora_B (M, E, out, r), scaling (M,).
template <typename scalar_t>
struct Lora {
  int64_t rank = 0;  // 0: the projection has no adapters
  int64_t in = 0;
  int64_t out = 0;
  int64_t num_experts = 0;
  AdapterStack<scalar_t> A;  // (r, in)
  AdapterStack<scalar_t> B;  // (out, r)
  const float* scaling = nullptr;

  acc_type<scalar_t> scale(int64_t modality) const { return scaling[modality - 1]; }

  Extension<scalar_t> extension(const scalar_t* u, const AdapterStack<scalar_t>& stack) const {
    return {rank, u, stack, num_experts};
  }
};

// Returns whether an adapter is stored in the accumulation's type rather than in the operands'.
template <typename scalar_t>
bool is_wide(const at::Tensor& adapter) {
  return adapter.scalar_type() != c10::CppTypeToScalarType<scalar_t>::value;
}

// Groups of rows whose sums are a parameter's gradients: per modality and expert, or per modality
// with the experts in order (shared).
// Group g belongs to modality g / (number of groups / number of modalities) + 1.
inline std::vector<GradientGroup> adapter_groups(const Segments& segments, int64_t num_experts,
                                                 bool shared) {
  std::vector<GradientGroup> groups;
  for (int64_t m = 1; m <= segments.num_modalities; ++m) {
    for (int64_t e = 0; e < num_experts; ++e) {
      if (e == 0 || !shared) groups.emplace_back();
      if (segments.modality(e, m).size() > 0) groups.back().rows.push_back(segments.modality(e, m));
    }
  }
  return groups;
}

// Writes rectangles of gradients laid out (groups, height, width), or (groups, width, height).
template <typename acc_t>
auto write_gradient(acc_t* grad, int64_t height, int64_t width, bool transposed) {
  return [=](const OuterItem& item, const acc_t* values, int64_t ld) {
    acc_t* base = grad + item.group * height * width;
    if (!transposed) {
      for (int64_t i = 0; i < item.num_rows; ++i) {
        std::copy_n(values + i * ld, item.num_columns, base + (item.row + i) * width + item.column);
      }
      return;
    }
    for (int64_t j = 0; j < item.num_columns; ++j) {
      acc_t* dst = base + (item.column + j) * height + item.row;
      for (int64_t i = 0; i < item.num_rows; ++i) dst[i] = values[i * ld + j];
    }
  };
}

}  // namespace moe_kernels::cpu
