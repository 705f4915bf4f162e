// What the forward and the backward of the MoE MLP share: arguments, their checks, and the sum
// over a token's experts.
#pragma once


#include <string>

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
  bool shared() const { return present() && A->size(1) == 1; }
};

struct MoeMlpInputs {
  const at::Tensor& hidden_states;
  const at::Tensor& topk_weights;
  const at::Tensor& perm;
  const at::Tensor& inv_perm;
  const at::Tensor& segment_offsets;
  const at::Tensor& gate_up_proj;
  const at::Tensor& down_proj;
  const OptionalTensor& extra_gate_up_proj;
  const OptionalTensor& extra_down_proj;
  LoraTensors gate_up;
  LoraTensors down;
  int64_t num_modalities;

  void check() const;
};

struct MoeMlpSizes {
  int64_t tokens, top_k, hidden, inter;
  int64_t experts, extra;  // of the frozen stack; added
  int64_t rank1, rank2;    // of gate_up and down, 0 without adapters
  int64_t slots() const { return tokens * top_k; }
  int64_t all_experts() const { return experts + extra; }

  explicit MoeMlpSizes(const MoeMlpInputs& in)
      : tokens(in.hidden_states.size(0)),
        top_k(in.topk_weights.size(1)),
        hidden(in.hidden_states.size(1)),
        inter(in.down_proj.size(2)),
        experts(in.gate_up_proj.size(0)),
        extra(in.extra_gate_up_proj ? in.extra_gate_up_proj->size(0) : 0),
        rank1(in.gate_up.rank()),
        rank2(in.down.rank()) {}
};

// One frozen stack and the experts added to it, which lie apart from it.
template <typename scalar_t>
struct ExpertStack {
  const scalar_t* base;
  const scalar_t* extra;
  int64_t num_base, rows, columns;

  Matrix<scalar_t> matrix(int64_t expert, bool transposed) const {
    const scalar_t* from = expert < num_base ? base : extra;
    const int64_t index = expert < num_base ? expert : expert - num_base;
    return {from + index * rows * columns, columns, transposed};
  }
};

template <typename scalar_t>
const scalar_t* data_or_null(const OptionalTensor& tensor) {
  return tensor ? tensor->const_data_ptr<scalar_t>() : nullptr;
}

// The inputs as the kernels read them.
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
        inv_perm(in.inv_perm.const_data_ptr<int64_t>()),
        hidden(in.hidden_states.const_data_ptr<scalar_t>()),
        gate_up_proj{in.gate_up_proj.const_data_ptr<scalar_t>(),
                     data_or_null<scalar_t>(in.extra_gate_up_proj), size.experts, 2 * size.inter,
                     size.hidden},
        down_proj{in.down_proj.const_data_ptr<scalar_t>(),
                  data_or_null<scalar_t>(in.extra_down_proj), size.experts, size.hidden,
                  size.inter},
        gate_up_lora(view(in.gate_up, size.hidden, 2 * size.inter)),
        down_lora(view(in.down, size.inter, size.hidden)),
        weights_tensor(in.topk_weights.to(kAccType).contiguous()),
        weights(weights_tensor.const_data_ptr<acc_t>()) {}

  int64_t token(int64_t p) const { return perm[p] / size.top_k; }
  acc_t weight(int64_t p) const { return weights[perm[p]]; }
  const scalar_t* hidden_row(int64_t p) const { return hidden + token(p) * size.hidden; }

  // out[t] = sum over k, in order, of weights[t, k] (1 when null) * rows[inv_perm[t, k]], in
  // acc_t; a slot beyond the dispatched rows adds nothing, a token without slots is zero.
  void combine(const acc_t* rows, const acc_t* slot_weights, scalar_t* out) const;

  MoeMlpSizes size;
  Segments segments;
  const int64_t* perm;
  const int64_t* inv_perm;
  const scalar_t* hidden;
  ExpertStack<scalar_t> gate_up_proj;  // (2I, H)
  ExpertStack<scalar_t> down_proj;     // (H, I)
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
            {lora.A->const_data_ptr<scalar_t>(), lora.A->size(1), r, in, false},
            {lora.B->const_data_ptr<scalar_t>(), size.experts, out, r, false},
            lora.scaling->const_data_ptr<float>()};
  }
};

template <typename scalar_t>
void MoeMlp<scalar_t>::combine(const acc_t* rows, const acc_t* slot_weights, scalar_t* out) const {
  constexpr int64_t kTokensPerItem = 16;
  const auto& kernel = kernels<scalar_t>();
  const int64_t num_rows = segments.num_rows(), H = size.hidden;
  const int64_t items = (size.tokens + kTokensPerItem - 1) / kTokensPerItem;
  for_each_item(items, Scratch::bytes<acc_t>(H), [&](int64_t item, char* memory) {
    acc_t* sum = Scratch(memory).take<acc_t>(H);
    const int64_t end = std::min(size.tokens, (item + 1) * kTokensPerItem);
    for (int64_t t = item * kTokensPerItem; t < end; ++t) {
      std::fill(sum, sum + H, acc_t(0));
      for (int64_t slot = t * size.top_k; slot < (t + 1) * size.top_k; ++slot) {
        const int64_t p = inv_perm[slot];
        if (p >= num_rows) continue;
        kernel.axpy(rows + p * H, slot_weights ? slot_weights[slot] : acc_t(1), sum, H);
      }
      kernel.store(sum, acc_t(1), out + t * H, H);
    }
  });
}

}  // namespace moe_kernels::cpu
