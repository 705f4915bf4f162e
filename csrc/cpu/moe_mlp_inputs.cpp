#include "moe_mlp.h"

#include <utility>

namespace moe_kernels::cpu {
namespace {

void check_lora(const LoraTensors& lora, const at::Tensor& hidden_states,
                const MatricesOf& stack, int64_t num_modalities) {
  const int64_t found = check_pair(hidden_states, hidden_states.scalar_type(), stack, lora.A,
                                   lora.B, lora.scaling, lora.name);
  TORCH_CHECK(!lora.present() || found == num_modalities, lora.name, "_lora_A must be of ",
              num_modalities, " modalities, is of ", found);
}

// A frozen stack of E matrices (rows, columns), which is packed where it has scales.
void check_base(const at::Tensor& stack, const std::string& name, const OptionalTensor& scales,
                at::ScalarType dtype, int64_t rows, int64_t columns, bool transposed) {
  const Packing packing = packing_of(stack);
  const std::string scales_name = name + "_scales";
  TORCH_CHECK((packing == Packing::none) != scales.has_value(), scales_name,
              " must be given for a packed stack and for no other");
  const int64_t E = stack.size(0);
  if (packing == Packing::none) {
    check_stack(stack, name.c_str(), dtype, {E, rows, columns}, transposed);
  } else if (packing == Packing::nf4) {
    TORCH_CHECK(columns % 2 == 0, name, " must have rows of whole bytes, has ", columns, " codes");
    check_tensor(stack, name.c_str(), at::kByte, {E, rows, columns / 2});
    check_tensor(*scales, scales_name.c_str(), at::kFloat, {-1});
    const int64_t weights = E * rows * columns, given = scales->numel();
    TORCH_CHECK(given >= 1, scales_name, " must not be empty");
    const int64_t block = nf4_block(weights, given);
    TORCH_CHECK((weights + block - 1) / block == given, scales_name,
                " must have a scale for each block of a power of two, but has ", given, " for ",
                weights, " weights");
  } else {
    const auto blocks = [](int64_t size) { return (size + kFp8Block - 1) / kFp8Block; };
    check_tensor(stack, name.c_str(), at::kFloat8_e4m3fn, {E, rows, columns});
    check_tensor(*scales, scales_name.c_str(), at::kFloat, {E, blocks(rows), blocks(columns)});
  }
}

}  // namespace

ExpertForm expert_form(std::string_view act, bool gated, double alpha, double limit, double shift,
                       bool interleaved) {
  static constexpr std::pair<std::string_view, ActKind> kNames[] = {
      {"silu", ActKind::silu},
      {"gelu", ActKind::gelu},
      {"gelu_tanh", ActKind::gelu_tanh},
      {"relu_squared", ActKind::relu_squared},
      {"clamped_swiglu", ActKind::clamped_swiglu}};
  TORCH_CHECK_VALUE(gated || !(interleaved || act == "clamped_swiglu"),
                    "without a gate there is neither clamped_swiglu nor an order of gate and up");
  for (const auto& [name, kind] : kNames) {
    if (name == act) return {{kind, gated, alpha, limit, shift}, interleaved};
  }
  TORCH_CHECK_VALUE(false, "act must be silu, gelu, gelu_tanh, relu_squared or clamped_swiglu, is ",
                    act);
}

void MoeMlpInputs::check() const {
  check_compute_dtype(hidden_states, "hidden_states");
  const at::ScalarType dtype = hidden_states.scalar_type();
  check_tensor(hidden_states, "hidden_states", dtype, {-1, -1});
  const int64_t T = hidden_states.size(0), H = hidden_states.size(1);
  check_compute_dtype(topk_weights, "topk_weights");
  check_tensor(topk_weights, "topk_weights", topk_weights.scalar_type(), {T, -1});
  const int64_t slots = topk_weights.numel();
  TORCH_CHECK(topk_weights.size(1) >= 1, "topk_weights must have at least one column");
  check_tensor(perm, "perm", at::kLong, {slots});
  check_permutation(perm, "perm");

  const bool transposed_up = is_transposed(gate_up_proj);
  const bool transposed_down = is_transposed(down_proj);
  check_shape(gate_up_proj, "gate_up_proj", {-1, -1, -1});
  check_shape(down_proj, "down_proj", {gate_up_proj.size(0), -1, -1});
  check_base(gate_up_proj, "gate_up_proj", gate_up_scales, dtype, gate_up_proj.size(1), H,
             transposed_up);
  const int64_t E = gate_up_proj.size(0), N = gate_up_proj.size(1), I = N / form.factor();
  TORCH_CHECK(E >= 1 && I >= 1 && H >= 1 && N % form.factor() == 0,
              "gate_up_proj must be (experts, ", form.act.gated ? "2 * " : "",
              "intermediate, hidden), none of them 0, is ", gate_up_proj.sizes());
  check_base(down_proj, "down_proj", down_scales, dtype, H, I, transposed_down);
  check_together(extra_gate_up_proj, "extra_gate_up_proj", extra_down_proj, "extra_down_proj");
  const int64_t X = extra_gate_up_proj ? extra_gate_up_proj->size(0) : 0;
  if (extra_gate_up_proj) {
    check_stack(*extra_gate_up_proj, "extra_gate_up_proj", dtype, {X, N, H}, transposed_up);
    check_stack(*extra_down_proj, "extra_down_proj", dtype, {X, H, I}, transposed_down);
  }
  if (gate_up_bias) check_tensor(*gate_up_bias, "gate_up_bias", dtype, {E + X, N});
  // The upper bound keeps the product below from overflowing.
  TORCH_CHECK(num_modalities >= 0 && num_modalities < std::max<int64_t>(segment_offsets.numel(), 1),
              "num_modalities must be between 0 and the number of segments, is ", num_modalities);
  check_tensor(segment_offsets, "segment_offsets", at::kLong, {(E + X) * (num_modalities + 1) + 1});
  check_offsets(segment_offsets, "segment_offsets", slots);
  check_ascending(perm, "perm", segment_offsets);
  check_lora(gate_up, hidden_states, {E, N, H}, num_modalities);
  check_lora(down, hidden_states, {E, H, I}, num_modalities);
}

}  // namespace moe_kernels::cpu
