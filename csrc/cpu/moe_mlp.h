// Parts that forward and backward of the MoE MLP share: arguments, their checks, and the sum over a
// token's experts.
#pragma once

#include <string>
#include <string_view>

#include "../ops.h"
#include "lora.h"

namespace moe_kernels::cpu {

using OptionalTensor = std::optional<at::Tensor>;

struct LoraTensors {
  const OptionalTensor& A;
  const OptionalTensor& B;
  const OptionalTensor& scaling;
  const char* name;

  bool present() const { return A.has_value(); }
  int64_t rank() const { return present() ? A->size(2) : 0; }
};

// Between the two products of an expert, and the order of gate and up in the first one's rows.
struct ExpertForm {
  Activation act;
  bool interleaved;

  bool paired() const { return act.gated && !interleaved; }  // the gate's rows, then up's
  int64_t factor() const { return act.gated ? 2 : 1; }
};

// Raises for a name that is no activation.
ExpertForm expert_form(std::string_view act, bool gated, double alpha, double limit, double shift,
                       bool interleaved);

// What a frozen stack's dtype says of how it is stored.
inline Packing packing_of(const at::Tensor& stack) {
  if (stack.scalar_type() == at::kByte) return Packing::nf4;
  return stack.scalar_type() == at::kFloat8_e4m3fn ? Packing::fp8 : Packing::none;
}

// Columns of the weights of a frozen stack (E, rows, columns).
inline int64_t columns_of(const at::Tensor& stack) {
  return stack.size(2) * (packing_of(stack) == Packing::nf4 ? 2 : 1);
}

// The power of two that is the number of weights with one scale. Several fit where one scale is
// all, and then any does.
inline int64_t nf4_block(int64_t weights, int64_t scales) {
  int64_t block = 2;
  while ((weights + block - 1) / block > scales) block *= 2;
  return block;
}

struct MoeMlpInputs {
  const at::Tensor& hidden_states;
  const at::Tensor& topk_weights;
  const at::Tensor& perm;
  const at::Tensor& segment_offsets;
  const at::Tensor& gate_up_proj;
  const at::Tensor& down_proj;
  const OptionalTensor& extra_gate_up_proj;
  const OptionalTensor& extra_down_proj;
  LoraTensors gate_up;
  LoraTensors down;
  const OptionalTensor& gate_up_bias;
  const OptionalTensor& gate_up_scales;
  const OptionalTensor& down_scales;
  ExpertForm form;
  int64_t num_modalities;

  void check() const;
};

struct MoeMlpSizes {
  int64_t tokens, top_k, hidden, inter;
  int64_t width;           // of the pre-activation: rows of gate_up_proj
  int64_t experts, extra;  // of the frozen stack; added
  int64_t rank1, rank2;    // of gate_up and down, 0 without adapters
  int64_t slots() const { return tokens * top_k; }
  int64_t all_experts() const { return experts + extra; }

  explicit MoeMlpSizes(const MoeMlpInputs& in)
      : tokens(in.hidden_states.size(0)),
        top_k(in.topk_weights.size(1)),
        hidden(in.hidden_states.size(1)),
        inter(columns_of(in.down_proj)),
        width(in.gate_up_proj.size(1)),
        experts(in.gate_up_proj.size(0)),
        extra(in.extra_gate_up_proj ? in.extra_gate_up_proj->size(0) : 0),
        rank1(in.gate_up.rank()),
        rank2(in.down.rank()) {}
};

// One frozen stack and the experts added to it, which lie apart from it, in the same layout.
template <typename scalar_t>
struct ExpertStack {
  const scalar_t* base;
  const scalar_t* extra;
  int64_t num_base, rows, columns;
  bool stored_transposed;
  PackedStack packed;  // in place of base

  bool is_packed() const { return packed.packing != Packing::none; }
  ExpertMatrix<scalar_t> matrix(int64_t expert, bool transposed) const {
    if (is_packed() && expert < num_base) {
      return {{nullptr, columns, transposed}, &packed, expert};
    }
    const scalar_t* from = expert < num_base ? base : extra;
    const int64_t index = expert < num_base ? expert : expert - num_base;
    return {{from + index * rows * columns, stored_transposed ? rows : columns,
             transposed != stored_transposed}};
  }
};

// A frozen stack of E matrices (rows, columns) and the experts added to it.
template <typename scalar_t>
ExpertStack<scalar_t> expert_stack(const at::Tensor& stack, const OptionalTensor& extra,
                                   const OptionalTensor& scales) {
  const int64_t experts = stack.size(0), rows = stack.size(1), columns = columns_of(stack);
  const scalar_t* added = extra ? extra->const_data_ptr<scalar_t>() : nullptr;
  const Packing packing = packing_of(stack);
  if (packing == Packing::none) {
    return {stack.const_data_ptr<scalar_t>(), added, experts, rows, columns, is_transposed(stack),
            {}};
  }
  const int64_t block =
      packing == Packing::nf4 ? nf4_block(experts * rows * columns, scales->numel()) : 0;
  return {nullptr, added, experts, rows, columns, false,
          {packing, static_cast<const uint8_t*>(stack.const_data_ptr()),
           scales->const_data_ptr<float>(), rows, columns, block}};
}

// first[i] = pairs[2 i], second[i] = pairs[2 i + 1], for n of each.
template <typename T>
void split_pairs(const T* pairs, int64_t n, T* first, T* second) {
  for (int64_t i = 0; i < n; ++i) {
    first[i] = pairs[2 * i];
    second[i] = pairs[2 * i + 1];
  }
}

template <typename T>
void join_pairs(const T* first, const T* second, int64_t n, T* pairs) {
  for (int64_t i = 0; i < n; ++i) {
    pairs[2 * i] = first[i];
    pairs[2 * i + 1] = second[i];
  }
}

constexpr int64_t kMaxPanelWidth = 32;  // two vectors of 16 elements

template <typename scalar_t>
const scalar_t* data_or_null(const OptionalTensor& tensor) {
  return tensor ? tensor->const_data_ptr<scalar_t>() : nullptr;
}

// Inputs in the form that the kernels read.
template <typename scalar_t>
struct MoeMlp {
  using acc_t = acc_type<scalar_t>;
  static constexpr at::ScalarType kAccType = c10::CppTypeToScalarType<acc_t>::value;
  static constexpr at::ScalarType kType = c10::CppTypeToScalarType<scalar_t>::value;

  explicit MoeMlp(const MoeMlpInputs& in)
      : size(in),
        segments{in.segment_offsets.const_data_ptr<int64_t>(), size.all_experts(),
                 in.num_modalities},
        perm(in.perm.const_data_ptr<int64_t>()),
        order{perm, size.top_k, size.tokens},
        hidden(in.hidden_states.const_data_ptr<scalar_t>()),
        gate_up_proj(
            expert_stack<scalar_t>(in.gate_up_proj, in.extra_gate_up_proj, in.gate_up_scales)),
        down_proj(expert_stack<scalar_t>(in.down_proj, in.extra_down_proj, in.down_scales)),
        gate_up_bias(data_or_null<scalar_t>(in.gate_up_bias)),
        form(in.form),
        gate_up_lora(view(in.gate_up, size.hidden, size.width)),
        down_lora(view(in.down, size.inter, size.hidden)),
        weights_tensor(in.topk_weights.to(kAccType).contiguous()),
        weights(weights_tensor.const_data_ptr<acc_t>()) {}

  int64_t token(int64_t p) const { return order.token(p); }
  acc_t weight(int64_t p) const { return weights[perm[p]]; }
  const scalar_t* hidden_row(int64_t p) const { return hidden + token(p) * size.hidden; }

  MoeMlpSizes size;
  Segments segments;
  const int64_t* perm;
  SlotOrder order;
  const scalar_t* hidden;
  ExpertStack<scalar_t> gate_up_proj;  // (width, H)
  ExpertStack<scalar_t> down_proj;     // (H, I)
  const scalar_t* gate_up_bias;        // (E + X, width) or null
  ExpertForm form;
  Lora<scalar_t> gate_up_lora;
  Lora<scalar_t> down_lora;
  at::Tensor weights_tensor;
  const acc_t* weights;  // (T, K)

 private:
  Lora<scalar_t> view(const LoraTensors& lora, int64_t in, int64_t out) const {
    if (!lora.present()) return {};
    const int64_t r = lora.rank();
    return {r,
            in,
            out,
            size.experts,
            {lora.A->const_data_ptr(), lora.A->size(1), r, in, is_wide<scalar_t>(*lora.A), false},
            {lora.B->const_data_ptr(), size.experts, out, r, is_wide<scalar_t>(*lora.B), false},
            lora.scaling->const_data_ptr<float>()};
  }
};

}  // namespace moe_kernels::cpu
