#include "layer.h"

#include <ATen/ops/empty.h>

#include <limits>

#include "checks.h"
#include "cuda/grouped_gemm_shapes.h"

namespace moe_kernels {
namespace {

constexpr int64_t kMaxInt = std::numeric_limits<int>::max();

OptionalTensor fitting(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(moe_kernels::fitting(*tensor)) : std::nullopt;
}

OptionalTensor fitting(const OptionalTensor& tensor, at::ScalarType dtype) {
  return fitting(tensor && tensor->scalar_type() != dtype ? tensor->to(dtype) : tensor);
}

void check_form(const Layer& layer) {
  TORCH_CHECK(layer.act == "silu" && layer.gated && !layer.interleaved && !layer.gate_up_bias &&
                  !layer.gate_up_scales && !layer.down_scales,
              "moe_mlp_forward and moe_mlp_backward on CUDA compute SwiGLU of rows [gate; up], "
              "without a bias and from stacks that are not packed");
  const at::ScalarType dtype = layer.hidden_states.scalar_type();
  TORCH_CHECK(dtype == at::kBFloat16 || dtype == at::kHalf,
              "hidden_states must be bfloat16 or float16, is ", dtype);
}

void check_stack(const Layer& layer, const ExpertStack& stack, const std::string& name,
                 int64_t rows, int64_t columns) {
  const at::Tensor& x = layer.hidden_states;
  const auto check = [&](const at::Tensor& tensor, const std::string& its_name) {
    check_like(x, tensor, its_name.c_str(), x.scalar_type(), {-1, rows, columns});
    check_vectors(tensor, its_name.c_str());
  };
  check(stack.base, name);
  if (stack.added) check(*stack.added, "extra_" + name);
}

void check(const Layer& layer) {
  const at::Tensor &x = layer.hidden_states, &up = layer.gate_up_proj.base;
  check_like(x, x, "hidden_states", x.scalar_type(), {-1, -1});
  check_float_or(x.scalar_type(), x, layer.topk_weights, "topk_weights", {x.size(0), -1});
  TORCH_CHECK(up.size(0) >= 1 && up.size(1) % 2 == 0,
              "gate_up_proj must be (experts, 2 * inter, hidden), is ", up.sizes());
  const int64_t E = up.size(0), inter = up.size(1) / 2, hidden = x.size(1);
  check_stack(layer, layer.gate_up_proj, "gate_up_proj", 2 * inter, hidden);
  check_stack(layer, layer.down_proj, "down_proj", hidden, inter);
  const bool is_half = x.scalar_type() == at::kHalf;
  TORCH_CHECK(cuda::grouped_gemm_supports(is_half ? cuda::Scalar::kHalf : cuda::Scalar::kBFloat16,
                                          hidden, inter) &&
                  4 * hidden * inter <= kMaxInt && layer.num_experts() < kMaxInt,
              "an expert's matrix must have fewer than 2^31 elements, of ", hidden, " and ", inter,
              "; and there must be fewer than 2^31 experts, there are ", layer.num_experts());
  const LowRankPair &of_up = layer.gate_up_lora, &of_down = layer.down_lora;
  const int64_t modalities_of_up = check_pair(x, x.scalar_type(), {E, 2 * inter, hidden}, of_up.a,
                                              of_up.b, of_up.scaling, "gate_up");
  const int64_t modalities_of_down = check_pair(x, x.scalar_type(), {E, hidden, inter}, of_down.a,
                                                of_down.b, of_down.scaling, "down");
  TORCH_CHECK(!of_up.a || !of_down.a || modalities_of_up == modalities_of_down,
              "both pairs of adapters must have the same number of modalities, have ",
              modalities_of_up, " and ", modalities_of_down);
}

}  // namespace

at::Tensor fitting(const at::Tensor& tensor) {
  const at::Tensor made = tensor.contiguous();
  return is_aligned(made) ? made : made.clone();
}

Layer fitting(Layer layer) {
  check_form(layer);
  check_routed(layer.hidden_states, layer.topk_weights, layer.topk_weights,
               layer.gate_up_proj.base, layer.down_proj.base, layer.gate_up_proj.added,
               layer.down_proj.added);
  TORCH_CHECK(layer.topk_weights.size(1) >= 1, "topk_weights must have at least one column");
  const at::ScalarType dtype = layer.hidden_states.scalar_type();
  const bool as_rows = layer.topk_weights.scalar_type() == dtype;
  layer.hidden_states = fitting(layer.hidden_states);
  layer.topk_weights = fitting(as_rows ? layer.topk_weights : layer.topk_weights.to(at::kFloat));
  for (ExpertStack* stack : {&layer.gate_up_proj, &layer.down_proj}) {
    stack->added = fitting(stack->added, stack->base.scalar_type());
  }
  for (LowRankPair* pair : {&layer.gate_up_lora, &layer.down_lora}) {
    *pair = {fitting(pair->a), fitting(pair->b), fitting(pair->scaling, at::kFloat)};
  }
  check(layer);
  return layer;
}

}  // namespace moe_kernels
