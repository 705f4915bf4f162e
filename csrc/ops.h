// The native ops; registration.cpp has their schemas, docs/design.md the meaning of their tensors.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

namespace moe_kernels {

// A layer whose output alone is wanted, on the CPU and, for a few tokens, on CUDA.
using MoeMlpInferenceOp = at::Tensor(
    const at::Tensor& hidden_states, const at::Tensor& topk_ids, const at::Tensor& topk_weights,
    const at::Tensor& gate_up_proj, const at::Tensor& down_proj,
    const std::optional<at::Tensor>& modality_ids,
    const std::optional<at::Tensor>& extra_gate_up_proj,
    const std::optional<at::Tensor>& extra_down_proj,
    const std::optional<at::Tensor>& gate_up_lora_A,
    const std::optional<at::Tensor>& gate_up_lora_B,
    const std::optional<at::Tensor>& gate_up_scaling, const std::optional<at::Tensor>& down_lora_A,
    const std::optional<at::Tensor>& down_lora_B, const std::optional<at::Tensor>& down_scaling,
    const std::optional<at::Tensor>& gate_up_bias,
    const std::optional<at::Tensor>& gate_up_scales, const std::optional<at::Tensor>& down_scales,
    std::string_view act, bool gated, double alpha, double limit, double shift, bool interleaved);

// A layer with its dispatch: out (T, H), then what a backward pass needs, without rows unless it
// saves: pre_act, u1, u2, perm, inv_perm and segment_offsets. num_modalities follows from the
// adapters.
using MoeMlpForwardOp = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                                   at::Tensor, at::Tensor>(
    const at::Tensor& hidden_states, const at::Tensor& topk_ids, const at::Tensor& topk_weights,
    const at::Tensor& gate_up_proj, const at::Tensor& down_proj,
    const std::optional<at::Tensor>& modality_ids,
    const std::optional<at::Tensor>& extra_gate_up_proj,
    const std::optional<at::Tensor>& extra_down_proj,
    const std::optional<at::Tensor>& gate_up_lora_A,
    const std::optional<at::Tensor>& gate_up_lora_B,
    const std::optional<at::Tensor>& gate_up_scaling, const std::optional<at::Tensor>& down_lora_A,
    const std::optional<at::Tensor>& down_lora_B, const std::optional<at::Tensor>& down_scaling,
    const std::optional<at::Tensor>& gate_up_bias,
    const std::optional<at::Tensor>& gate_up_scales, const std::optional<at::Tensor>& down_scales,
    std::string_view act, bool gated, double alpha, double limit, double shift, bool interleaved,
    bool save_for_backward);

// needs: hidden_states, topk_weights, extra_gate_up_proj, extra_down_proj, gate_up_lora_A,
// gate_up_lora_B, down_lora_A, down_lora_B; returns the gradients of those needed, in this order,
// of parameters in float32. Gradients of the first frozen_extra added experts are not computed:
// zeros. Only CUDA reads inv_perm.
using MoeMlpBackwardOp = std::vector<at::Tensor>(
    const at::Tensor& grad_out, const at::Tensor& hidden_states, const at::Tensor& topk_weights,
    const at::Tensor& perm, const at::Tensor& inv_perm, const at::Tensor& segment_offsets,
    const at::Tensor& gate_up_proj, const at::Tensor& down_proj,
    const std::optional<at::Tensor>& extra_gate_up_proj,
    const std::optional<at::Tensor>& extra_down_proj,
    const std::optional<at::Tensor>& gate_up_lora_A,
    const std::optional<at::Tensor>& gate_up_lora_B,
    const std::optional<at::Tensor>& gate_up_scaling, const std::optional<at::Tensor>& down_lora_A,
    const std::optional<at::Tensor>& down_lora_B, const std::optional<at::Tensor>& down_scaling,
    const std::optional<at::Tensor>& gate_up_bias,
    const std::optional<at::Tensor>& gate_up_scales, const std::optional<at::Tensor>& down_scales,
    std::string_view act, bool gated, double alpha, double limit, double shift, bool interleaved,
    const at::Tensor& pre_act, const at::Tensor& u1, const at::Tensor& u2, int64_t num_modalities,
    const c10::List<bool>& needs, int64_t frozen_extra);

}  // namespace moe_kernels

namespace moe_kernels::cpu {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> dispatch(
    const at::Tensor& topk_ids, int64_t num_experts, const std::optional<at::Tensor>& modality_ids,
    int64_t num_modalities);

MoeMlpForwardOp moe_mlp_forward;

// moe_mlp_forward for tensors of any layout, keeping nothing for a backward pass.
MoeMlpInferenceOp moe_mlp_inference;

MoeMlpBackwardOp moe_mlp_backward;

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

// Signatures of the ops of the backend "cuda".
namespace moe_kernels {

// Like cpu::dispatch, but rows with ids out of range go to the tail: a check would make the host
// wait.
using DispatchOp = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>(
    const at::Tensor& topk_ids, int64_t num_experts, const std::optional<at::Tensor>& modality_ids,
    int64_t num_modalities);

// Like `dispatch`, and writes the maps of its segments (see below) in the same launches.
using DispatchWithMapsOp = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                                      std::vector<at::Tensor>>(
    const at::Tensor& topk_ids, int64_t num_experts, const std::optional<at::Tensor>& modality_ids,
    int64_t num_modalities, at::IntArrayRef blocks, at::IntArrayRef groups);

// Returns tiles (3, n) and groups (3, g) for each map, see csrc/cuda/tiles.h. `blocks` has the rows
// of a tile of each map; `groups` has five numbers for each: num, period, stride, offset and width.
using TileMapsOp = std::vector<at::Tensor>(const at::Tensor& segment_offsets, int64_t num_rows,
                                           at::IntArrayRef blocks, at::IntArrayRef groups);

// out (T, width): the sum of each token's rows, in the order of its experts, times `weights` (T, K)
// or 1. Places from num_rows (1) on were not dispatched and count as zeros.
using CombineOp = at::Tensor(const at::Tensor& rows, const at::Tensor& inv_perm,
                             const at::Tensor& num_rows, const std::optional<at::Tensor>& weights,
                             int64_t num_tokens);

// out = left M on the rows of the tiles, which are of num_pairs pairs (modality, expert): see
// csrc/cuda/shrink.h. With segment_offsets other rows get zeros; without, they are not written.
// `matrix` (..., rank, size_k) if rank_first, else (..., size_k, rank), has `experts` of these for
// each modality: num_base, or 1 that all share.
using ShrinkOp = void(const at::Tensor& out, const at::Tensor& left, const at::Tensor& matrix,
                      const at::Tensor& perm, const at::Tensor& tiles,
                      const std::optional<at::Tensor>& segment_offsets, int64_t num_pairs,
                      int64_t num_base, int64_t experts, int64_t top_k, bool by_token,
                      bool rank_first);

// Returns the sums of at most two problems, (groups, height, width), or the last two exchanged, in
// float32: of (factor * weight * left)^T right over each group's rows. Then right[0] matrix
// (T * K, height) in float32 on the rows of its groups alone, or nothing without a matrix; and the
// sum over n of dots (n, T, K) in dots_dtype, or nothing without dots: see csrc/cuda/wgrad.h. Only
// without problems there is no need of a perm. Behind the sums of the problems come those of
// `folded` (slots, ...), (num_modalities * num_base, ...), with the offsets of the segments.
using WgradOp = std::tuple<std::vector<at::Tensor>, at::Tensor, at::Tensor>(
    at::TensorList left, at::TensorList right, at::TensorList tiles, at::TensorList groups,
    at::TensorList factors, const c10::List<std::optional<at::Tensor>>& weights,
    const std::optional<at::Tensor>& matrix, at::IntArrayRef chunks,
    const c10::List<bool>& transposed, const c10::List<bool>& left_by_token,
    const c10::List<bool>& right_by_token, const std::optional<at::Tensor>& perm,
    const std::optional<at::Tensor>& dots, at::ScalarType dots_dtype, int64_t top_k,
    at::TensorList folded, const std::optional<at::Tensor>& segment_offsets, int64_t num_base,
    int64_t num_modalities);

// out[token] += s u V on the rows of the tiles alone, which are of modalities: see
// csrc/cuda/add_low_rank.h.
using AddLowRankOp = void(const at::Tensor& out, const at::Tensor& u, const at::Tensor& v,
                          const at::Tensor& scaling, const at::Tensor& perm,
                          const at::Tensor& tiles, bool rank_last);

// The grouped GEMMs of routed rows and their experts' weights: see csrc/cuda/grouped_gemm.h.
// `tiles` are of experts, in `block_m` rows; u, v and scaling are given together or not at all.
// Parts of u2 (parts, T * K, rank) in float32 come of down_lora_A, and there are none without it.
using GateUpOp = std::tuple<at::Tensor, at::Tensor, at::Tensor>(  // pre_act if `save`, act, parts
    const at::Tensor& left, const at::Tensor& stack, const std::optional<at::Tensor>& extra,
    const at::Tensor& perm, const at::Tensor& tiles, const at::Tensor& segment_offsets,
    const std::optional<at::Tensor>& u, const std::optional<at::Tensor>& v,
    const std::optional<at::Tensor>& scaling, int64_t block_m, bool save,
    const std::optional<at::Tensor>& down_lora_A);
// u is whole, or parts (n, T * K, rank) of it in float32. With `save` it returns the sum of the
// parts beside the product, with zeros in rows without an adapter; else a tensor without rows.
using GroupedGemmOp = std::tuple<at::Tensor, at::Tensor>(
    const at::Tensor& left, const at::Tensor& stack, const std::optional<at::Tensor>& extra,
    const at::Tensor& perm, const at::Tensor& tiles, const at::Tensor& segment_offsets,
    const std::optional<at::Tensor>& u, const std::optional<at::Tensor>& v,
    const std::optional<at::Tensor>& scaling, int64_t block_m, bool transposed, bool save);
// Returns d_pre, act, dots (n, T, K), and with u1 three tensors of what the gradients of adapters
// need, each empty unless `wanted`: du1 (n, T * K, rank) in parts, and the sums of dB1 and dA2 in
// slots, see FoldedSums in csrc/cuda/wgrad.h.
using ActBackwardOp = std::tuple<at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>>(
    const at::Tensor& left, const at::Tensor& stack, const std::optional<at::Tensor>& extra,
    const at::Tensor& perm, const at::Tensor& tiles, const at::Tensor& segment_offsets,
    const std::optional<at::Tensor>& u, const std::optional<at::Tensor>& v,
    const std::optional<at::Tensor>& scaling, int64_t block_m, const at::Tensor& weights,
    const at::Tensor& pre_act, bool act_of_adapted, bool act_of_added,
    const std::optional<at::Tensor>& u1, const std::optional<at::Tensor>& gate_up_lora_B,
    const std::optional<at::Tensor>& gate_up_scaling, const c10::List<bool>& wanted);

// The ops of whole layers take bfloat16 or float16 on CUDA: SwiGLU of rows [gate; up] without a
// bias, in stacks that are stored as they are. moe_mlp_inference takes what cuda::decode_takes says
// of that. It copies nothing: tensors are contiguous, those that are read 16 bytes at once begin at
// a multiple of it, and added experts and adapters are float32 or of that dtype.

// moe_mlp_forward and moe_mlp_backward on CUDA, and without memory: the other ops in turn. They
// make tensors fit, other than the stacks.
namespace course {
MoeMlpForwardOp moe_mlp_forward;
MoeMlpBackwardOp moe_mlp_backward;
}  // namespace course

// Each op's checks and the tensors that it returns, not yet filled, on any device. An op on meta
// tensors does nothing else, and an op on CUDA begins with it.
namespace outputs {
DispatchOp dispatch;
DispatchWithMapsOp dispatch_with_maps;
TileMapsOp tile_maps;
CombineOp combine;
ShrinkOp shrink;
WgradOp wgrad;
AddLowRankOp add_low_rank;
GateUpOp gate_up;
GroupedGemmOp grouped_gemm;
ActBackwardOp act_backward;
MoeMlpInferenceOp moe_mlp_inference;
}  // namespace outputs

namespace cuda {
DispatchOp dispatch;
DispatchWithMapsOp dispatch_with_maps;
TileMapsOp tile_maps;
CombineOp combine;
ShrinkOp shrink;
WgradOp wgrad;
AddLowRankOp add_low_rank;
GateUpOp gate_up;
GroupedGemmOp grouped_gemm;
ActBackwardOp act_backward;
MoeMlpInferenceOp moe_mlp_inference;
}  // namespace cuda

}  // namespace moe_kernels
