// Notation: dO is grad_out's row of a slot, unweighted; dA' = d(loss)/d(act) before the slot's
// router weight w; a, u1 and u2 as in the forward.
#include <ATen/Dispatch.h>

#include "moe_mlp.h"

namespace moe_kernels::cpu {
namespace {

struct Needs {
  bool hidden, weights, extra_gate_up, extra_down, A1, B1, A2, B2;

  explicit Needs(const c10::List<bool>& flags)
      : hidden(flags[0]),
        weights(flags[1]),
        extra_gate_up(flags[2]),
        extra_down(flags[3]),
        A1(flags[4]),
        B1(flags[5]),
        A2(flags[6]),
        B2(flags[7]) {}
  bool gate_up_lora() const { return A1 || B1; }
};

template <typename scalar_t>
class Backward {
 public:
  using acc_t = acc_type<scalar_t>;

  Backward(const MoeMlpInputs& in, const at::Tensor& grad_out, const at::Tensor& pre_act,
           const at::Tensor& u1, const at::Tensor& u2, const Needs& needs, int64_t frozen_extra)
      : in_(in),
        mlp_(in),
        size_(mlp_.size),
        needs_(needs),
        frozen_extra_(frozen_extra),
        grad_out_(grad_out.const_data_ptr<scalar_t>()),
        pre_act_(pre_act.const_data_ptr<scalar_t>()),
        u1_(u1.const_data_ptr<scalar_t>()),
        u2_(u2.const_data_ptr<scalar_t>()),
        adapted_(adapted_blocks(mlp_.segments, size_.experts,
                                rows_per_projection(mlp_.segments.num_rows()))),
        act_plan_(column_plan<scalar_t>(size_.inter, size_.hidden)) {
    plan_work();
  }

  std::vector<at::Tensor> run() {
    const bool through_down = needs_.hidden || needs_.weights || needs_.gate_up_lora();
    if (needs_.A2 || (size_.rank2 > 0 && through_down)) shrink_grad_out();
    act_backward();
    if (needs_.A1 || (size_.rank1 > 0 && needs_.hidden)) shrink_dpre();
    recompute_act();
    std::vector<at::Tensor> grads;
    if (needs_.hidden) grads.push_back(hidden_gradient());
    if (needs_.weights) grads.push_back(weight_gradient());
    if (needs_.extra_gate_up) grads.push_back(extra_gate_up_gradient());
    if (needs_.extra_down) grads.push_back(extra_down_gradient());
    if (needs_.A1) grads.push_back(gate_up_A_gradient());
    if (needs_.B1) grads.push_back(gate_up_B_gradient());
    if (needs_.A2) grads.push_back(down_A_gradient());
    if (needs_.B2) grads.push_back(down_B_gradient());
    return grads;
  }

 private:
  static at::Tensor allocate(at::IntArrayRef sizes) {
    return empty(sizes, MoeMlp<scalar_t>::kType);
  }
  static at::Tensor allocate_acc(at::IntArrayRef sizes) {
    return empty(sizes, MoeMlp<scalar_t>::kAccType);
  }

  const scalar_t* grad_row(int64_t p) const { return grad_out_ + mlp_.token(p) * size_.hidden; }

  // Chooses the rows of each expert that need d(act): all if a gradient outside the adapters is
  // needed, else only rows whose parameters train.
  void plan_work() {
    const bool all = needs_.hidden || needs_.weights;
    if (needs_.hidden || needs_.gate_up_lora() || needs_.extra_gate_up) {
      dpre_tensor_ = allocate({size_.slots(), size_.width});
      dpre_ = dpre_tensor_.mutable_data_ptr<scalar_t>();
    }
    if (needs_.A2 || needs_.extra_down) {
      act_tensor_ = allocate({size_.slots(), size_.inter});
      act_ = act_tensor_.mutable_data_ptr<scalar_t>();
    }
    if (needs_.weights) {
      const int64_t parts = act_plan_.num_items();
      dots_tensor_ = allocate_acc({parts, size_.slots()});
      dots_ = dots_tensor_.mutable_data_ptr<acc_t>();
    }
    for (int64_t e = 0; e < size_.all_experts(); ++e) {
      const bool base = e < size_.experts, trained = e >= size_.experts + frozen_extra_;
      const RowRange every = mlp_.segments.expert(e), adapted = mlp_.segments.adapted(e);
      if (all || (trained && needs_.extra_gate_up)) {
        append_blocks(act_rows_, e, 0, every, kRowsPerItem);
      } else if (base && needs_.gate_up_lora()) {
        append_blocks(act_rows_, e, 0, adapted, kRowsPerItem);
      } else if ((base && needs_.A2) || (trained && needs_.extra_down)) {
        append_blocks(act_only_rows_, e, 0, base ? adapted : every, kRowsPerItem);
      }
    }
  }

  // result = row @ stack for adapted rows, in acc_t, and scale * result rounded, the operand of the
  // extension.
  template <typename Row>
  void shrink(const Lora<scalar_t>& lora, int64_t K, const Row& row, at::Tensor& result,
              at::Tensor& scaled) const {
    const auto& kernel = kernels<scalar_t>();
    const int64_t r = lora.rank;
    result = allocate_acc({size_.slots(), r});
    scaled = allocate({size_.slots(), r});
    acc_t* du = result.mutable_data_ptr<acc_t>();
    scalar_t* scaled_du = scaled.mutable_data_ptr<scalar_t>();
    shrink_rows<scalar_t>(adapted_, K, r, row, lora.B,
                          [&](int64_t p, const RowBlock& block, acc_t* values) {
                            std::copy(values, values + r, du + p * r);
                            kernel.store(values, lora.scale(block.modality), scaled_du + p * r, r);
                          });
  }

  // du2 = dO B2
  void shrink_grad_out() {
    shrink(mlp_.down_lora, size_.hidden, [&](int64_t p) { return grad_row(p); }, du2_,
           scaled_du2_);
  }

  // du1 = dpre B1
  void shrink_dpre() {
    const int64_t width = size_.width;
    shrink(mlp_.gate_up_lora, width, [&](int64_t p) { return dpre_ + p * width; }, du1_,
           scaled_du1_);
  }

  // dA' = dO Wd + (s2 du2) A2, and in its epilogue <dA', a>, dpre, and a where a gradient needs it.
  void act_backward() {
    Extension<scalar_t> extension;
    if (du2_.defined()) {
      extension = mlp_.down_lora.extension(scaled_du2_.template const_data_ptr<scalar_t>(),
                                           mlp_.down_lora.A);
    }
    const ExpertProduct<scalar_t> product{mlp_.segments, size_.hidden, act_plan_, extension,
                                          /*direct=*/false, mlp_.down_proj.is_packed()};
    expert_products<scalar_t>(
        product, act_rows_, [&](int64_t p) { return grad_row(p); },
        [&](int64_t e) { return mlp_.down_proj.matrix(e, false); },
        [&](int64_t, int64_t p, int m, int64_t item, const ItemColumns& columns, acc_t* c,
            int64_t ldc) {
          for (int i = 0; i < m; ++i) {
            const acc_t dot = activation_row(p + i, columns, c + i * ldc);
            if (dots_) dots_[item * size_.slots() + p + i] = dot;
          }
        });
  }

  // Panels of one row of dA' -> dpre, and a; returns their part of <dA', a>.
  acc_t activation_row(int64_t p, const ItemColumns& columns, const acc_t* dact) {
    const auto& kernel = kernels<scalar_t>();
    const int64_t I = size_.inter;
    acc_t dot = 0;
    for (int64_t panel = 0; panel < columns.num_panels; ++panel) {
      const int64_t column = columns.begin[panel], size = columns.size[panel];
      const acc_t* d = dact + panel * act_plan_.width;
      scalar_t* act = act_ ? act_ + p * I + column : nullptr;
      if (mlp_.form.interleaved) {
        dot += interleaved_panel(p, column, size, d, act);
        continue;
      }
      const scalar_t* gate = pre_act_ + p * size_.width + column;
      scalar_t* dgate = dpre_ ? dpre_ + p * size_.width + column : nullptr;
      dot += kernel.activate_backward(mlp_.form.act, d, mlp_.weight(p), gate, gate + I, dgate,
                                      dgate ? dgate + I : nullptr, act, size);
    }
    return dot;
  }

  // One panel of a row where gate and up alternate.
  acc_t interleaved_panel(int64_t p, int64_t column, int64_t size, const acc_t* dact,
                          scalar_t* act) {
    scalar_t gate[kMaxPanelWidth], up[kMaxPanelWidth], dgate[kMaxPanelWidth], dup[kMaxPanelWidth];
    const int64_t pairs = p * size_.width + 2 * column;
    split_pairs(pre_act_ + pairs, size, gate, up);
    const acc_t dot = kernels<scalar_t>().activate_backward(
        mlp_.form.act, dact, mlp_.weight(p), gate, up, dpre_ ? dgate : nullptr, dup, act, size);
    if (dpre_) join_pairs(dgate, dup, size, dpre_ + pairs);
    return dot;
  }

  // Recomputes a from the pre-activation, for rows that need it without d(act).
  void recompute_act() {
    const auto& kernel = kernels<scalar_t>();
    const int64_t I = size_.inter, width = size_.width;
    const int64_t halves = mlp_.form.interleaved ? I : 0;
    const int64_t bytes = Scratch::bytes<acc_t>(width) + 2 * Scratch::bytes<acc_t>(halves);
    const int64_t items = static_cast<int64_t>(act_only_rows_.size());
    for_each_item(items, bytes, [&](int64_t item, char* memory) {
      Scratch scratch(memory);
      acc_t* pre = scratch.take<acc_t>(width);
      acc_t* gate = halves ? scratch.take<acc_t>(I) : pre;
      acc_t* up = halves ? scratch.take<acc_t>(I) : pre + I;
      const RowRange rows = act_only_rows_[item].rows;
      for (int64_t p = rows.begin; p < rows.end; ++p) {
        kernel.load(pre_act_ + p * width, acc_t(1), pre, width);
        if (halves) split_pairs(pre, I, gate, up);
        kernel.activate(mlp_.form.act, gate, up, nullptr, nullptr, act_ + p * I, I);
      }
    });
  }

  // dx = sum over k of dpre Wgu + (s1 du1) A1
  at::Tensor hidden_gradient() {
    const int64_t H = size_.hidden, width = size_.width;
    at::Tensor dhidden = allocate({size_.tokens, H});
    Extension<scalar_t> extension;
    if (du1_.defined()) {
      extension = mlp_.gate_up_lora.extension(scaled_du1_.template const_data_ptr<scalar_t>(),
                                              mlp_.gate_up_lora.A);
    }
    const ColumnPlan plan = occupying_threads(column_plan<scalar_t>(H, width), 1);
    const ExpertProduct<scalar_t> product{mlp_.segments, width, plan, extension,
                                          /*direct=*/false, mlp_.gate_up_proj.is_packed()};
    combined_products<scalar_t>(
        product, mlp_.order, [&](int64_t p) { return dpre_ + p * width; },
        [&](int64_t e) { return mlp_.gate_up_proj.matrix(e, false); },
        [](int64_t) { return acc_t(1); }, dhidden.mutable_data_ptr<scalar_t>());
    return dhidden;
  }

  // d(topk_weights)[t, k] = <dA', a>, its parts added in column order; 0 for a dropped slot.
  at::Tensor weight_gradient() {
    at::Tensor grad = allocate_acc({size_.tokens, size_.top_k});
    acc_t* data = grad.mutable_data_ptr<acc_t>();
    const int64_t num_rows = mlp_.segments.num_rows(), slots = size_.slots();
    const int64_t parts = dots_tensor_.size(0);
    for (int64_t p = 0; p < slots; ++p) {
      acc_t sum = 0;
      for (int64_t i = 0; p < num_rows && i < parts; ++i) sum += dots_[i * slots + p];
      data[mlp_.perm[p]] = sum;
    }
    return grad.to(in_.topk_weights.scalar_type());
  }

  int64_t modality_of(const OuterItem& item, const std::vector<GradientGroup>& groups) const {
    const auto per_modality = static_cast<int64_t>(groups.size()) / in_.num_modalities;
    return item.group / per_modality + 1;
  }

  // dA1 = sum of (s1 du1)^T x
  at::Tensor gate_up_A_gradient() {
    const auto& lora = mlp_.gate_up_lora;
    const acc_t* du = du1_.template const_data_ptr<acc_t>();
    return adapter_gradient(
        *in_.gate_up.A, lora, false,
        [&](int64_t p, int64_t i, int64_t n, acc_t scale, acc_t* dst) {
          kernels<acc_t>().load(du + p * lora.rank + i, scale, dst, n);
        },
        [&](int64_t p) { return mlp_.hidden_row(p); });
  }

  // dB1 = sum of dpre^T (s1 u1)
  at::Tensor gate_up_B_gradient() {
    const auto& lora = mlp_.gate_up_lora;
    return adapter_gradient(
        *in_.gate_up.B, lora, true,
        [&](int64_t p, int64_t i, int64_t n, acc_t scale, acc_t* dst) {
          kernels<scalar_t>().load(u1_ + p * lora.rank + i, scale, dst, n);
        },
        [&](int64_t p) { return dpre_ + p * lora.out; });
  }

  // dA2 = sum of (w s2 du2)^T a
  at::Tensor down_A_gradient() {
    const auto& lora = mlp_.down_lora;
    const acc_t* du = du2_.template const_data_ptr<acc_t>();
    return adapter_gradient(
        *in_.down.A, lora, false,
        [&](int64_t p, int64_t i, int64_t n, acc_t scale, acc_t* dst) {
          kernels<acc_t>().load(du + p * lora.rank + i, scale * mlp_.weight(p), dst, n);
        },
        [&](int64_t p) { return act_ + p * lora.in; });
  }

  // dB2 = sum of dO^T (w s2 u2)
  at::Tensor down_B_gradient() {
    const auto& lora = mlp_.down_lora;
    return adapter_gradient(
        *in_.down.B, lora, true,
        [&](int64_t p, int64_t i, int64_t n, acc_t scale, acc_t* dst) {
          kernels<scalar_t>().load(u2_ + p * lora.rank + i, scale * mlp_.weight(p), dst, n);
        },
        [&](int64_t p) { return grad_row(p); });
  }

  // Both kinds are computed as (r, columns), the skinny side as the left operand; B's is stored
  // transposed. left(p, i, n, scale, dst), right(p).
  template <typename Left, typename Right>
  at::Tensor adapter_gradient(const at::Tensor& parameter, const Lora<scalar_t>& lora, bool is_B,
                              const Left& left, const Right& right) {
    at::Tensor grad = allocate_acc(parameter.sizes());
    const int64_t width = is_B ? lora.out : lora.in;
    const auto groups = adapter_groups(mlp_.segments, size_.experts,
                                       !is_B && parameter.size(1) == 1);
    wgrad<scalar_t>(
        groups, lora.rank, width,
        [&](const OuterItem& item, int64_t p, acc_t* dst) {
          left(p, item.row, item.num_rows, lora.scale(modality_of(item, groups)), dst);
        },
        right, write_gradient(grad.mutable_data_ptr<acc_t>(), lora.rank, width, is_B));
    return grad;
  }

  // sum of dpre^T x
  at::Tensor extra_gate_up_gradient() {
    const int64_t width = size_.width;
    return extra_gradient(
        *in_.extra_gate_up_proj,
        [&](const OuterItem& item, int64_t p, acc_t* dst) {
          kernels<scalar_t>().load(dpre_ + p * width + item.row, acc_t(1), dst, item.num_rows);
        },
        [&](int64_t p) { return mlp_.hidden_row(p); });
  }

  // sum of (w dO)^T a
  at::Tensor extra_down_gradient() {
    return extra_gradient(
        *in_.extra_down_proj,
        [&](const OuterItem& item, int64_t p, acc_t* dst) {
          kernels<scalar_t>().load(grad_row(p) + item.row, mlp_.weight(p), dst, item.num_rows);
        },
        [&](int64_t p) { return act_ + p * size_.inter; });
  }

  // Frozen experts get zeros, like an expert without rows.
  template <typename Left, typename Right>
  at::Tensor extra_gradient(const at::Tensor& parameter, const Left& left, const Right& right) {
    at::Tensor grad = allocate(parameter.sizes());
    scalar_t* data = grad.mutable_data_ptr<scalar_t>();
    const int64_t height = parameter.size(1), width = parameter.size(2);
    std::vector<GradientGroup> groups(size_.extra);
    for (int64_t x = frozen_extra_; x < size_.extra; ++x) {
      groups[x].rows.push_back(mlp_.segments.expert(size_.experts + x));
    }
    wgrad<scalar_t>(groups, height, width, left, right,
                    [&](const OuterItem& item, const acc_t* values, int64_t ld) {
                      for (int64_t i = 0; i < item.num_rows; ++i) {
                        const int64_t row = item.group * height + item.row + i;
                        kernels<scalar_t>().store(values + i * ld, acc_t(1),
                                                  data + row * width + item.column,
                                                  item.num_columns);
                      }
                    });
    return grad;
  }

  const MoeMlpInputs& in_;
  MoeMlp<scalar_t> mlp_;
  const MoeMlpSizes& size_;
  Needs needs_;
  int64_t frozen_extra_;      // of the first added experts
  const scalar_t* grad_out_;  // (T, H)
  const scalar_t* pre_act_;   // (T*K, width)
  const scalar_t* u1_;        // (T*K, r1)
  const scalar_t* u2_;        // (T*K, r2)
  std::vector<RowBlock> adapted_;
  std::vector<RowBlock> act_rows_;
  std::vector<RowBlock> act_only_rows_;
  ColumnPlan act_plan_;          // independent of threads: its items are terms of <dA', a>
  at::Tensor du1_, scaled_du1_;  // (T*K, r1), adapted rows
  at::Tensor du2_, scaled_du2_;  // (T*K, r2), adapted rows
  at::Tensor dpre_tensor_, act_tensor_, dots_tensor_;
  scalar_t* dpre_ = nullptr;  // (T*K, width), null where no gradient needs it; so are the next two
  scalar_t* act_ = nullptr;   // (T*K, I), rows whose parameters train
  acc_t* dots_ = nullptr;     // (column items, T*K)
};

void check_needs(const c10::List<bool>& flags, int64_t frozen_extra, const MoeMlpInputs& in) {
  TORCH_CHECK(flags.size() == 8, "needs must have 8 entries, has ", flags.size());
  const Needs needs(flags);
  TORCH_CHECK(in.extra_gate_up_proj || !(needs.extra_gate_up || needs.extra_down),
              "needs asks for gradients of extra experts, but there are none");
  const int64_t extra = in.extra_gate_up_proj ? in.extra_gate_up_proj->size(0) : 0;
  TORCH_CHECK(frozen_extra >= 0 && frozen_extra <= extra, "frozen_extra must be in 0..", extra,
              ", is ", frozen_extra);
  TORCH_CHECK(in.gate_up.present() || !(needs.A1 || needs.B1),
              "needs asks for gradients of the gate_up adapters, but there are none");
  TORCH_CHECK(in.down.present() || !(needs.A2 || needs.B2),
              "needs asks for gradients of the down adapters, but there are none");
}

void check_saved(const MoeMlpInputs& in, const at::Tensor& grad_out, const at::Tensor& pre_act,
                 const at::Tensor& u1, const at::Tensor& u2) {
  const MoeMlpSizes size(in);
  const at::ScalarType dtype = in.hidden_states.scalar_type();
  check_tensor(grad_out, "grad_out", dtype, {size.tokens, size.hidden});
  check_tensor(pre_act, "pre_act", dtype, {size.slots(), size.width});
  check_tensor(u1, "u1", dtype, {size.slots(), size.rank1});
  check_tensor(u2, "u2", dtype, {size.slots(), size.rank2});
}

}  // namespace

std::vector<at::Tensor> moe_mlp_backward(
    const at::Tensor& grad_out, const at::Tensor& hidden_states, const at::Tensor& topk_weights,
    const at::Tensor& perm, const at::Tensor& /*inv_perm*/, const at::Tensor& segment_offsets,
    const at::Tensor& gate_up_proj, const at::Tensor& down_proj,
    const OptionalTensor& extra_gate_up_proj, const OptionalTensor& extra_down_proj,
    const OptionalTensor& gate_up_lora_A, const OptionalTensor& gate_up_lora_B,
    const OptionalTensor& gate_up_scaling, const OptionalTensor& down_lora_A,
    const OptionalTensor& down_lora_B, const OptionalTensor& down_scaling,
    const OptionalTensor& gate_up_bias, const OptionalTensor& gate_up_scales,
    const OptionalTensor& down_scales, std::string_view act, bool gated, double alpha,
    double limit, double shift, bool interleaved, const at::Tensor& pre_act, const at::Tensor& u1,
    const at::Tensor& u2, int64_t num_modalities, const c10::List<bool>& needs,
    int64_t frozen_extra) {
  const MoeMlpInputs inputs{hidden_states,
                            topk_weights,
                            perm,
                            segment_offsets,
                            gate_up_proj,
                            down_proj,
                            extra_gate_up_proj,
                            extra_down_proj,
                            {gate_up_lora_A, gate_up_lora_B, gate_up_scaling, "gate_up"},
                            {down_lora_A, down_lora_B, down_scaling, "down"},
                            gate_up_bias,
                            gate_up_scales,
                            down_scales,
                            expert_form(act, gated, alpha, limit, shift, interleaved),
                            num_modalities};
  inputs.check();
  check_needs(needs, frozen_extra, inputs);
  check_saved(inputs, grad_out, pre_act, u1, u2);
  return AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kBFloat16, at::kHalf, hidden_states.scalar_type(), "moe_mlp_backward", [&] {
        return Backward<scalar_t>(inputs, grad_out, pre_act, u1, u2, Needs(needs), frozen_extra)
            .run();
      });
}

}  // namespace moe_kernels::cpu
