// The tensors of a layer, as its forward and its backward in one op take them on CUDA. Nothing here
// needs CUDA.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "ops.h"

namespace moe_kernels {

using OptionalTensor = std::optional<at::Tensor>;

struct ExpertStack {
  at::Tensor base;  // (experts, rows, columns), frozen
  OptionalTensor added;

  // What the grouped GEMMs take.
  OptionalTensor extra() const { return added && added->size(0) > 0 ? added : std::nullopt; }
};

struct LowRankPair {
  OptionalTensor a, b, scaling;

  int64_t rank() const { return a ? a->size(2) : 0; }
};

struct Layer {
  at::Tensor hidden_states;  // (T, H)
  at::Tensor topk_weights;   // (T, K)
  ExpertStack gate_up_proj;  // (E, 2I, H)
  ExpertStack down_proj;     // (E, H, I)
  LowRankPair gate_up_lora;
  LowRankPair down_lora;
  // What is refused.
  OptionalTensor gate_up_bias, gate_up_scales, down_scales;
  std::string_view act;
  bool gated, interleaved;

  int64_t num_base() const { return gate_up_proj.base.size(0); }
  int64_t num_added() const { return gate_up_proj.added ? gate_up_proj.added->size(0) : 0; }
  int64_t num_experts() const { return num_base() + num_added(); }
  int64_t num_modalities() const {
    const OptionalTensor& a = gate_up_lora.a ? gate_up_lora.a : down_lora.a;
    return a ? a->size(0) : 0;
  }
};

// The ops that a course launches: those of CUDA, or their outputs alone.
namespace course {

struct Launches {
  DispatchWithMapsOp* dispatch_with_maps;
  TileMapsOp* tile_maps;
  ShrinkOp* shrink;
  GateUpOp* gate_up;
  GroupedGemmOp* grouped_gemm;
  ActBackwardOp* act_backward;
  WgradOp* wgrad;
  CombineOp* combine;
};

extern const Launches* on_device;  // set where kernels are built

}  // namespace course

// Makes a tensor fit the kernels: contiguous, and at a multiple of 16 bytes.
at::Tensor fitting(const at::Tensor& tensor);

// Returns a layer whose tensors fit the kernels, other than the frozen stacks, and checks it.
Layer fitting(Layer layer);

}  // namespace moe_kernels
