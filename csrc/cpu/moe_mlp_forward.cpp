#include <ATen/Dispatch.h>

#include "moe_mlp.h"

namespace moe_kernels::cpu {
namespace {

// Average number of rows of an expert up to which its weights are not packed.
constexpr int64_t kDirectRows = 16;

template <typename scalar_t>
class Forward {
 public:
  using acc_t = acc_type<scalar_t>;

  Forward(const MoeMlpInputs& in, bool save)
      : mlp_(in),
        size_(mlp_.size),
        save_(save),
        adapted_(adapted_blocks(mlp_.segments, size_.experts,
                                rows_per_projection(mlp_.segments.num_rows()))) {
    for (int64_t e = 0; e < size_.all_experts(); ++e) {
      append_blocks(blocks_, e, 0, mlp_.segments.expert(e), kRowsPerItem);
    }
    const int64_t saved = save ? size_.slots() : 0;
    out_ = allocate({size_.tokens, size_.hidden});
    pre_act_ = allocate({saved, size_.width});
    u1_ = allocate({saved, size_.rank1});
    u2_ = allocate({saved, size_.rank2});
    clear_unused();
  }

  std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> run() {
    const at::Tensor act = gate_up();
    down(act.const_data_ptr<scalar_t>());
    return {out_, pre_act_, u1_, u2_};
  }

 private:
  // Saved rows without a result are zeros: each output is a function of the inputs.
  void clear_unused() const {
    const int64_t total = size_.slots();
    zero_rows(pre_act_, mlp_.segments.num_rows(), total);
    for_each_unadapted(mlp_.segments, size_.experts, total, [&](int64_t begin, int64_t end) {
      zero_rows(u1_, begin, end);
      zero_rows(u2_, begin, end);
    });
  }

  static at::Tensor allocate(at::IntArrayRef sizes) {
    return empty(sizes, MoeMlp<scalar_t>::kType);
  }

  // Stores u = row A^T, rounded, in `saved`; returns scale * u, rounded once more: the operand of
  // B.
  template <typename Row>
  at::Tensor shrink(const Lora<scalar_t>& lora, const Row& row, at::Tensor& saved) const {
    const auto& kernel = kernels<scalar_t>();
    const int64_t r = lora.rank;
    const at::Tensor scaled = allocate({size_.slots(), r});
    scalar_t* scaled_u = scaled.mutable_data_ptr<scalar_t>();
    scalar_t* u = save_ ? saved.mutable_data_ptr<scalar_t>() : scaled_u;
    const auto store = [&](int64_t p, const RowBlock& block, acc_t* values) {
      kernel.store(values, acc_t(1), u + p * r, r);
      kernel.load(u + p * r, acc_t(1), values, r);
      kernel.store(values, lora.scale(block.modality), scaled_u + p * r, r);
    };
    if (direct()) {
      shrink_few_rows<scalar_t>(adapted_, lora.in, r, row, lora.A.t(), store);
    } else {
      shrink_rows<scalar_t>(adapted_, lora.in, r, row, lora.A.t(), store);
    }
    return scaled;
  }

  // The activation (T*K, I), fused with the products of gate and up.
  at::Tensor gate_up() {
    const auto row = [&](int64_t p) { return mlp_.hidden_row(p); };
    at::Tensor scaled;
    Extension<scalar_t> extension;
    if (size_.rank1 > 0) {
      scaled = shrink(mlp_.gate_up_lora, row, u1_);
      extension = mlp_.gate_up_lora.extension(scaled.const_data_ptr<scalar_t>(),
                                              mlp_.gate_up_lora.B.t());
    }
    at::Tensor act = allocate({size_.slots(), size_.inter});
    scalar_t* act_data = act.mutable_data_ptr<scalar_t>();
    scalar_t* pre = save_ ? pre_act_.mutable_data_ptr<scalar_t>() : nullptr;
    // The grouping of columns into items depends on counts and threads; the sum of an element does
    // not.
    const ColumnPlan plan =
        occupying_threads(column_plan<scalar_t>(size_.width, size_.hidden, mlp_.form.paired()),
                          static_cast<int64_t>(blocks_.size()));
    const ExpertProduct<scalar_t> product{mlp_.segments, size_.hidden, plan, extension,
                                          direct(mlp_.gate_up_proj),
                                          mlp_.gate_up_proj.is_packed()};
    expert_products<scalar_t>(
        product, blocks_, row, [&](int64_t e) { return mlp_.gate_up_proj.matrix(e, true); },
        [&](int64_t expert, int64_t p, int m, int64_t, const ItemColumns& columns, acc_t* c,
            int64_t ldc) {
          for (int i = 0; i < m; ++i) {
            add_bias(expert, columns, plan.width, c + i * ldc);
            activate(p + i, columns, plan.width, c + i * ldc, pre, act_data);
          }
        });
    return act;
  }

  // Adds an expert's bias to a row of the panels.
  void add_bias(int64_t expert, const ItemColumns& columns, int64_t width, acc_t* c) const {
    if (mlp_.gate_up_bias == nullptr) return;
    const scalar_t* bias = mlp_.gate_up_bias + expert * size_.width;
    for (int64_t j = 0; j < columns.num_panels; ++j) {
      kernels<scalar_t>().add(bias + columns.begin[j], c + j * width, columns.size[j]);
    }
  }

  // A row of the panels -> the pre-activation, if it is saved, and the activation.
  void activate(int64_t p, const ItemColumns& columns, int64_t width, const acc_t* c,
                scalar_t* pre, scalar_t* act) const {
    const auto& kernel = kernels<scalar_t>();
    const ExpertForm& form = mlp_.form;
    const int64_t I = size_.inter;
    const int64_t panels = form.paired() ? columns.num_panels / 2 : columns.num_panels;
    for (int64_t j = 0; j < panels; ++j) {
      const int64_t column = columns.begin[j], size = columns.size[j];
      const acc_t* gate = c + j * width;
      scalar_t* gate_out = pre ? pre + p * size_.width + column : nullptr;
      if (form.interleaved) {
        acc_t halves[kMaxPanelWidth];
        split_pairs(gate, size / 2, halves, halves + size / 2);
        if (gate_out) kernel.store(gate, acc_t(1), gate_out, size);
        kernel.activate(form.act, halves, halves + size / 2, nullptr, nullptr,
                        act + p * I + column / 2, size / 2);
      } else {
        kernel.activate(form.act, gate, gate + panels * width, gate_out,
                        gate_out ? gate_out + I : nullptr, act + p * I + column, size);
      }
    }
  }

  // Computes the weighted sum of the experts' outputs.
  void down(const scalar_t* act) {
    const auto row = [&](int64_t p) { return act + p * size_.inter; };
    at::Tensor scaled;
    Extension<scalar_t> extension;
    if (size_.rank2 > 0) {
      scaled = shrink(mlp_.down_lora, row, u2_);
      extension =
          mlp_.down_lora.extension(scaled.const_data_ptr<scalar_t>(), mlp_.down_lora.B.t());
    }
    const ColumnPlan plan = occupying_threads(column_plan<scalar_t>(size_.hidden, size_.inter), 1);
    const ExpertProduct<scalar_t> product{mlp_.segments, size_.inter, plan, extension,
                                          direct(mlp_.down_proj), mlp_.down_proj.is_packed()};
    combined_products<scalar_t>(
        product, mlp_.order, row, [&](int64_t e) { return mlp_.down_proj.matrix(e, true); },
        [&](int64_t p) { return mlp_.weight(p); }, out_.mutable_data_ptr<scalar_t>());
  }

  // Reads weights without packing: with few rows per expert, reading them takes most of the time.
  // Depends on shapes alone, without added experts: adding some changes no bit of the rows that do
  // not choose them.
  bool direct() const { return size_.slots() <= kDirectRows * size_.experts; }
  bool direct(const ExpertStack<scalar_t>& stack) const {
    return direct() && !stack.stored_transposed;
  }

  MoeMlp<scalar_t> mlp_;
  const MoeMlpSizes& size_;
  bool save_;
  std::vector<RowBlock> adapted_;
  std::vector<RowBlock> blocks_;
  at::Tensor out_, pre_act_, u1_, u2_;
};

OptionalTensor contiguous(const OptionalTensor& tensor,
                          std::optional<at::ScalarType> dtype = std::nullopt) {
  if (!tensor) return std::nullopt;
  return tensor->to(dtype.value_or(tensor->scalar_type())).contiguous();
}

at::Tensor in_layout(const at::Tensor& stack, bool transposed) {
  return transposed ? stack.transpose(1, 2).contiguous().transpose(1, 2) : stack.contiguous();
}

OptionalTensor in_layout(const OptionalTensor& stack, bool transposed, at::ScalarType dtype) {
  if (!stack) return std::nullopt;
  return in_layout(stack->to(dtype), transposed);
}

// Returns an adapter's first size, (M, ...); 0 without one.
int64_t modalities_of(const OptionalTensor& gate_up_lora_A, const OptionalTensor& down_lora_A) {
  const OptionalTensor& lora_A = gate_up_lora_A ? gate_up_lora_A : down_lora_A;
  return lora_A && lora_A->dim() > 0 ? lora_A->size(0) : 0;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
moe_mlp_forward(
    const at::Tensor& hidden_states, const at::Tensor& topk_ids, const at::Tensor& topk_weights,
    const at::Tensor& gate_up_proj, const at::Tensor& down_proj,
    const OptionalTensor& modality_ids, const OptionalTensor& extra_gate_up_proj,
    const OptionalTensor& extra_down_proj, const OptionalTensor& gate_up_lora_A,
    const OptionalTensor& gate_up_lora_B, const OptionalTensor& gate_up_scaling,
    const OptionalTensor& down_lora_A, const OptionalTensor& down_lora_B,
    const OptionalTensor& down_scaling, const OptionalTensor& gate_up_bias,
    const OptionalTensor& gate_up_scales, const OptionalTensor& down_scales, std::string_view act,
    bool gated, double alpha, double limit, double shift, bool interleaved,
    bool save_for_backward) {
  check_routed(hidden_states, topk_ids, topk_weights, gate_up_proj, down_proj, extra_gate_up_proj,
               extra_down_proj);
  const int64_t num_modalities = modalities_of(gate_up_lora_A, down_lora_A);
  const int64_t num_experts =
      gate_up_proj.size(0) + (extra_gate_up_proj ? extra_gate_up_proj->size(0) : 0);
  const auto sorted = dispatch(topk_ids, num_experts, modality_ids, num_modalities);
  const at::Tensor &perm = std::get<0>(sorted), &segment_offsets = std::get<4>(sorted);
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
  const auto found = AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kBFloat16, at::kHalf, hidden_states.scalar_type(), "moe_mlp_forward",
      [&] { return Forward<scalar_t>(inputs, save_for_backward).run(); });
  const auto saved = [&](const at::Tensor& of_dispatch) {
    return save_for_backward ? of_dispatch : empty({0}, at::kLong);
  };
  return std::tuple_cat(
      found, std::make_tuple(saved(perm), saved(std::get<1>(sorted)), saved(segment_offsets)));
}

at::Tensor moe_mlp_inference(
    const at::Tensor& hidden_states, const at::Tensor& topk_ids, const at::Tensor& topk_weights,
    const at::Tensor& gate_up_proj, const at::Tensor& down_proj,
    const OptionalTensor& modality_ids, const OptionalTensor& extra_gate_up_proj,
    const OptionalTensor& extra_down_proj, const OptionalTensor& gate_up_lora_A,
    const OptionalTensor& gate_up_lora_B, const OptionalTensor& gate_up_scaling,
    const OptionalTensor& down_lora_A, const OptionalTensor& down_lora_B,
    const OptionalTensor& down_scaling, const OptionalTensor& gate_up_bias,
    const OptionalTensor& gate_up_scales, const OptionalTensor& down_scales, std::string_view act,
    bool gated, double alpha, double limit, double shift, bool interleaved) {
  check_compute_dtype(hidden_states, "hidden_states");
  if (!gate_up_scales) check_compute_dtype(gate_up_proj, "gate_up_proj");
  if (extra_gate_up_proj) check_compute_dtype(*extra_gate_up_proj, "extra_gate_up_proj");
  if (extra_down_proj) check_compute_dtype(*extra_down_proj, "extra_down_proj");
  check_routed(hidden_states, topk_ids, topk_weights, gate_up_proj, down_proj, extra_gate_up_proj,
               extra_down_proj);
  const at::ScalarType dtype = (gate_up_scales ? hidden_states : gate_up_proj).scalar_type();
  const bool transposed_up = is_transposed(gate_up_proj);
  const bool transposed_down = is_transposed(down_proj);
  const int64_t num_experts =
      gate_up_proj.size(0) + (extra_gate_up_proj ? extra_gate_up_proj->size(0) : 0);
  const at::Tensor ids = topk_ids.contiguous();
  check_topk_ids(ids, num_experts);
  return std::get<0>(moe_mlp_forward(
      hidden_states.to(dtype).contiguous(), ids, topk_weights.contiguous(),
      in_layout(gate_up_proj, transposed_up), in_layout(down_proj, transposed_down),
      contiguous(modality_ids), in_layout(extra_gate_up_proj, transposed_up, dtype),
      in_layout(extra_down_proj, transposed_down, dtype), contiguous(gate_up_lora_A),
      contiguous(gate_up_lora_B), contiguous(gate_up_scaling, at::kFloat),
      contiguous(down_lora_A), contiguous(down_lora_B), contiguous(down_scaling, at::kFloat),
      contiguous(gate_up_bias), contiguous(gate_up_scales), contiguous(down_scales), act, gated,
      alpha, limit, shift, interleaved, /*save_for_backward=*/false));
}

}  // namespace moe_kernels::cpu
