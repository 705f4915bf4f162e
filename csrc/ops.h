// The native ops; registration.cpp has their schemas, docs/design.md the meaning of their tensors.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace moe_kernels::cpu {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> dispatch(
    const at::Tensor& topk_ids, int64_t num_experts, const std::optional<at::Tensor>& modality_ids,
    int64_t num_modalities);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> moe_mlp_forward(
    const at::Tensor& hidden_states, const at::Tensor& topk_weights, const at::Tensor& perm,
    const at::Tensor& segment_offsets, const at::Tensor& gate_up_proj,
    const at::Tensor& down_proj, const std::optional<at::Tensor>& extra_gate_up_proj,
    const std::optional<at::Tensor>& extra_down_proj,
    const std::optional<at::Tensor>& gate_up_lora_A,
    const std::optional<at::Tensor>& gate_up_lora_B,
    const std::optional<at::Tensor>& gate_up_scaling, const std::optional<at::Tensor>& down_lora_A,
    const std::optional<at::Tensor>& down_lora_B, const std::optional<at::Tensor>& down_scaling,
    int64_t num_modalities, bool save_for_backward);

// dispatch and moe_mlp_forward in one call, from tensors of any layout, without what a backward
// needs; ids out of range raise. num_modalities follows from the adapters.
at::Tensor moe_mlp_inference(
    const at::Tensor& hidden_states, const at::Tensor& topk_ids, const at::Tensor& topk_weights,
    const at::Tensor& gate_up_proj, const at::Tensor& down_proj,
    const std::optional<at::Tensor>& modality_ids,
    const std::optional<at::Tensor>& extra_gate_up_proj,
    const std::optional<at::Tensor>& extra_down_proj,
    const std::optional<at::Tensor>& gate_up_lora_A,
    const std::optional<at::Tensor>& gate_up_lora_B,
    const std::optional<at::Tensor>& gate_up_scaling, const std::optional<at::Tensor>& down_lora_A,
    const std::optional<at::Tensor>& down_lora_B, const std::optional<at::Tensor>& down_scaling);

// needs: hidden_states, topk_weights, extra_gate_up_proj, extra_down_proj, gate_up_lora_A,
// gate_up_lora_B, down_lora_A, down_lora_B; returns the gradients of those needed, in this order.
std::vector<at::Tensor> moe_mlp_backward(
    const at::Tensor& grad_out, const at::Tensor& hidden_states, const at::Tensor& topk_weights,
    const at::Tensor& perm, const at::Tensor& segment_offsets,
    const at::Tensor& gate_up_proj, const at::Tensor& down_proj,
    const std::optional<at::Tensor>& extra_gate_up_proj,
    const std::optional<at::Tensor>& extra_down_proj,
    const std::optional<at::Tensor>& gate_up_lora_A,
    const std::optional<at::Tensor>& gate_up_lora_B,
    const std::optional<at::Tensor>& gate_up_scaling, const std::optional<at::Tensor>& down_lora_A,
    const std::optional<at::Tensor>& down_lora_B, const std::optional<at::Tensor>& down_scaling,
    const at::Tensor& pre_act, const at::Tensor& u1, const at::Tensor& u2, int64_t num_modalities,
    const c10::List<bool>& needs);

at::Tensor lora_linear_forward(at::Tensor& out, const at::Tensor& hidden_states,
                               const at::Tensor& perm, const at::Tensor& segment_offsets,
                               const at::Tensor& lora_A, const at::Tensor& lora_B,
                               const at::Tensor& scaling, bool save_for_backward);

// needs: lora_A, lora_B.
std::vector<at::Tensor> lora_linear_backward(
    const at::Tensor& grad_out, const at::Tensor& hidden_states, const at::Tensor& u,
    const at::Tensor& perm, const at::Tensor& segment_offsets, const at::Tensor& lora_A,
    const at::Tensor& lora_B, const at::Tensor& scaling,
    const std::optional<at::Tensor>& grad_hidden, const c10::List<bool>& needs);

}  // namespace moe_kernels::cpu

namespace moe_kernels::cuda {

// As cpu::dispatch, but ids out of range go to the tail: the host is not asked to wait for a check.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> dispatch(
    const at::Tensor& topk_ids, int64_t num_experts, const std::optional<at::Tensor>& modality_ids,
    int64_t num_modalities);

// out (T, width): the sum of each token's rows, in the order of its experts, times `weights` (T, K)
// or 1. Places from num_rows (1) on were not dispatched and count as zeros.
at::Tensor combine(const at::Tensor& rows, const at::Tensor& inv_perm, const at::Tensor& num_rows,
                   const std::optional<at::Tensor>& weights, int64_t num_tokens);

}  // namespace moe_kernels::cuda
