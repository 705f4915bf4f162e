// The CUDA kernels as ops: launches and streams. This is the only file that includes both torch and
// CUDA. csrc/outputs.cpp checks that all tensors are contiguous and on one device.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../layer.h"
#include "../ops.h"
#include "add_low_rank.h"
#include "combine.h"
#include "decode.h"
#include "dispatch.h"
#include "grouped_gemm.h"
#include "shrink.h"
#include "tile_maps.h"
#include "wgrad.h"

namespace moe_kernels::cuda {
namespace {

Scalar scalar_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kHalf:
      return Scalar::kHalf;
    case at::kBFloat16:
      return Scalar::kBFloat16;
    default:
      return Scalar::kFloat;
  }
}

const void* pointer_of(const std::optional<at::Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr() : nullptr;
}

Scalar scalar_of(const std::optional<at::Tensor>& tensor) {
  return tensor ? scalar_of(*tensor) : Scalar::kFloat;
}

// Fills in the arguments that the grouped GEMMs share.
GroupedGemm make_gemm(const at::Tensor& left, const at::Tensor& stack,
                      const std::optional<at::Tensor>& extra, const at::Tensor& perm,
                      const at::Tensor& tiles, const at::Tensor& segment_offsets,
                      const std::optional<at::Tensor>& u, const std::optional<at::Tensor>& v,
                      const std::optional<at::Tensor>& scaling, int64_t size_n) {
  const int64_t num_experts = stack.size(0) + (extra ? extra->size(0) : 0);
  const int64_t rows = perm.numel(), tokens = left.size(0);
  return {
      .left = left.const_data_ptr(),
      .stack = stack.const_data_ptr(),
      .extra = pointer_of(extra),
      .perm = perm.const_data_ptr<int64_t>(),
      .tiles = tiles.const_data_ptr<int64_t>(),
      .segments = segment_offsets.const_data_ptr<int64_t>(),
      .u = pointer_of(u),
      .v = pointer_of(v),
      .scaling = scaling ? scaling->const_data_ptr<float>() : nullptr,
      .sum = nullptr,
      .num_rows = static_cast<int>(rows),
      .num_parts = u && u->dim() == 3 ? static_cast<int>(u->size(0)) : 0,
      .num_tiles = static_cast<int>(tiles.size(1)),
      .num_base = static_cast<int>(stack.size(0)),
      .num_experts = static_cast<int>(num_experts),
      .num_modalities = static_cast<int>((segment_offsets.numel() - 1) / num_experts) - 1,
      .experts_of_v = v ? static_cast<int>(v->size(1)) : 1,
      .rank = u ? static_cast<int>(u->size(-1)) : 0,
      .size_k = static_cast<int>(left.size(1)),
      .size_n = static_cast<int>(size_n),
      .top_k = tokens == 0 ? 1 : static_cast<int>(rows / tokens),
  };
}

// Builds the maps that have groups; `made` has the tiles and the groups of each in turn.
TileMaps maps_of(const std::vector<at::Tensor>& made, at::IntArrayRef blocks,
                 at::IntArrayRef groups) {
  TileMaps maps{.num_maps = 0, .maps = {}};
  for (size_t i = 0; i < blocks.size(); ++i) {
    if (groups[5 * i] == 0) continue;
    const auto number = [&](size_t k) { return static_cast<int>(groups[5 * i + k]); };
    maps.maps[maps.num_maps++] = {
        .groups = {number(0), number(1), number(2), number(3), number(4)},
        .block = static_cast<int>(blocks[i]),
        .num_tiles = static_cast<int>(made[2 * i].size(1)),
        .tiles = made[2 * i].mutable_data_ptr<int64_t>(),
        .rows = made[2 * i + 1].mutable_data_ptr<int64_t>(),
    };
  }
  return maps;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> dispatch(
    const at::Tensor& topk_ids, int64_t num_experts, const std::optional<at::Tensor>& modality_ids,
    int64_t num_modalities) {
  const auto [perm, inv_perm, tokens, experts, segments, maps] =
      dispatch_with_maps(topk_ids, num_experts, modality_ids, num_modalities, {}, {});
  return {perm, inv_perm, tokens, experts, segments};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>>
dispatch_with_maps(const at::Tensor& topk_ids, int64_t num_experts,
                   const std::optional<at::Tensor>& modality_ids, int64_t num_modalities,
                   at::IntArrayRef blocks, at::IntArrayRef groups) {
  const c10::cuda::CUDAGuard guard(topk_ids.device());
  const auto made = outputs::dispatch_with_maps(topk_ids, num_experts, modality_ids,
                                                num_modalities, blocks, groups);
  const auto& [perm, inv_perm, tokens, experts, segments, maps] = made;
  const Sort sort = make_sort(topk_ids.const_data_ptr<int64_t>(),
                              modality_ids ? modality_ids->const_data_ptr<int64_t>() : nullptr,
                              static_cast<int>(topk_ids.numel()),
                              static_cast<int>(topk_ids.size(1)), static_cast<int>(num_experts),
                              static_cast<int>(num_modalities));
  const at::Tensor counts = at::empty({static_cast<int64_t>(sort.num_blocks) * sort.num_keys()},
                                      topk_ids.options().dtype(at::kInt));
  const DispatchOut out{
      .perm = perm.mutable_data_ptr<int64_t>(),
      .inv_perm = inv_perm.mutable_data_ptr<int64_t>(),
      .tokens_per_expert = tokens.mutable_data_ptr<int64_t>(),
      .expert_offsets = experts.mutable_data_ptr<int64_t>(),
      .segment_offsets = segments.mutable_data_ptr<int64_t>(),
  };
  C10_CUDA_CHECK(launch_dispatch(sort, counts.mutable_data_ptr<int>(), out,
                                 maps_of(maps, blocks, groups),
                                 c10::cuda::getCurrentCUDAStream()));
  return made;
}

std::vector<at::Tensor> tile_maps(const at::Tensor& segment_offsets, int64_t num_rows,
                                  at::IntArrayRef blocks, at::IntArrayRef groups) {
  const c10::cuda::CUDAGuard guard(segment_offsets.device());
  const auto made = outputs::tile_maps(segment_offsets, num_rows, blocks, groups);
  const Segments<int64_t> segments{
      .offsets = segment_offsets.const_data_ptr<int64_t>(),
      .num = static_cast<int>(segment_offsets.numel()) - 1,
      .num_rows = static_cast<int>(num_rows),
  };
  C10_CUDA_CHECK(launch_tile_maps(segments, maps_of(made, blocks, groups),
                                  c10::cuda::getCurrentCUDAStream()));
  return made;
}

at::Tensor combine(const at::Tensor& rows, const at::Tensor& inv_perm, const at::Tensor& num_rows,
                   const std::optional<at::Tensor>& weights, int64_t num_tokens) {
  const c10::cuda::CUDAGuard guard(rows.device());
  const at::Tensor out = outputs::combine(rows, inv_perm, num_rows, weights, num_tokens);
  if (out.numel() == 0) return out;
  const Combine args{
      .rows = rows.const_data_ptr(),
      .inv_perm = inv_perm.const_data_ptr<int64_t>(),
      .num_rows = num_rows.const_data_ptr<int64_t>(),
      .weights = pointer_of(weights),
      .out = out.mutable_data_ptr(),
      .num_tokens = num_tokens,
      .width = static_cast<int>(rows.size(1)),
      .top_k = static_cast<int>(rows.size(0) / num_tokens),
  };
  C10_CUDA_CHECK(launch_combine(args, scalar_of(rows),
                                scalar_of(weights),
                                c10::cuda::getCurrentCUDAStream()));
  return out;
}

void shrink(const at::Tensor& out, const at::Tensor& left, const at::Tensor& matrix,
            const at::Tensor& perm, const at::Tensor& tiles,
            const std::optional<at::Tensor>& segment_offsets, int64_t num_pairs, int64_t num_base,
            int64_t experts, int64_t top_k, bool by_token, bool rank_first) {
  const c10::cuda::CUDAGuard guard(left.device());
  outputs::shrink(out, left, matrix, perm, tiles, segment_offsets, num_pairs, num_base, experts,
                  top_k, by_token, rank_first);
  const Shrink args{
      .left = left.const_data_ptr(),
      .matrix = matrix.const_data_ptr(),
      .perm = perm.const_data_ptr<int64_t>(),
      .tiles = tiles.const_data_ptr<int64_t>(),
      .segments = segment_offsets ? segment_offsets->const_data_ptr<int64_t>() : nullptr,
      .out = out.mutable_data_ptr(),
      .num_tiles = static_cast<int>(tiles.size(1)),
      .num_rows = static_cast<int>(perm.numel()),
      .num_base = static_cast<int>(num_base),
      .num_modalities = static_cast<int>(num_pairs / num_base),
      .experts_of_m = static_cast<int>(experts),
      .size_k = static_cast<int>(left.size(1)),
      .rank = static_cast<int>(out.size(1)),
      .top_k = static_cast<int>(top_k),
      .by_token = by_token,
      .rank_first = rank_first,
  };
  C10_CUDA_CHECK(launch_shrink(args, scalar_of(left), scalar_of(matrix), scalar_of(out),
                               c10::cuda::getCurrentCUDAStream()));
}

std::tuple<std::vector<at::Tensor>, at::Tensor, at::Tensor> wgrad(
    at::TensorList left, at::TensorList right, at::TensorList tiles, at::TensorList groups,
    at::TensorList factors, const c10::List<std::optional<at::Tensor>>& weights,
    const std::optional<at::Tensor>& matrix, at::IntArrayRef chunks,
    const c10::List<bool>& transposed, const c10::List<bool>& left_by_token,
    const c10::List<bool>& right_by_token, const std::optional<at::Tensor>& perm,
    const std::optional<at::Tensor>& dots, at::ScalarType dots_dtype, int64_t top_k,
    at::TensorList folded, const std::optional<at::Tensor>& segment_offsets, int64_t num_base,
    int64_t num_modalities) {
  TORCH_CHECK(perm || dots, "wgrad takes problems with perm, or dots alone");
  const c10::cuda::CUDAGuard guard((perm ? *perm : *dots).device());
  const auto made =
      outputs::wgrad(left, right, tiles, groups, factors, weights, matrix, chunks, transposed,
                     left_by_token, right_by_token, perm, dots, dots_dtype, top_k, folded,
                     segment_offsets, num_base, num_modalities);
  const auto& [sums, du, sum_of_dots] = made;
  const int64_t rows = perm ? perm->numel() : sum_of_dots.numel();
  Wgrad args{
      .problems = {},
      .folded = {.sums = {},
                 .segments = segment_offsets ? segment_offsets->const_data_ptr<int64_t>() : nullptr,
                 .num_sums = static_cast<int>(folded.size()),
                 .num_base = static_cast<int>(num_base),
                 .num_modalities = static_cast<int>(num_modalities)},
      .perm = perm ? perm->const_data_ptr<int64_t>() : nullptr,
      .du = du.mutable_data_ptr<float>(),
      .parts = nullptr,
      .dots = dots ? dots->const_data_ptr<float>() : nullptr,
      .sum_of_dots = sum_of_dots.mutable_data_ptr(),
      .num_rows = rows,
      .dots_dtype = scalar_of(sum_of_dots),
      .num_problems = static_cast<int>(left.size()),
      .num_dots = dots ? static_cast<int>(dots->size(0)) : 0,
      .top_k = static_cast<int>(top_k),
  };
  const int64_t parts = matrix ? wgrad_parts(static_cast<int>(right[0].size(1))) * du.numel() : 0;
  const auto partials = [&](size_t i) {
    return rows > chunks[i] ? 2 * (rows / chunks[i]) * sums[i].size(1) * sums[i].size(2) : 0;
  };
  int64_t size = parts;
  for (size_t i = 0; i < left.size(); ++i) size += partials(i);
  const at::Tensor scratch = at::empty({size}, du.options());
  args.parts = scratch.mutable_data_ptr<float>();
  float* partial = args.parts + parts;
  for (size_t i = 0; i < left.size(); ++i) {
    const std::optional<at::Tensor> its_weights = weights[i];
    args.problems[i] = {
        .left = left[i].const_data_ptr(),
        .right = right[i].const_data_ptr(),
        .tiles = tiles[i].const_data_ptr<int64_t>(),
        .groups = groups[i].const_data_ptr<int64_t>(),
        .factors = factors[i].const_data_ptr<float>(),
        .weights = pointer_of(its_weights),
        .matrix = i == 0 ? pointer_of(matrix) : nullptr,
        .out = sums[i].mutable_data_ptr<float>(),
        .partial = partial,
        .chunk = chunks[i],
        .left_dtype = scalar_of(left[i]),
        .weights_dtype = scalar_of(its_weights),
        .matrix_dtype = scalar_of(matrix),
        .num_tiles = static_cast<int>(tiles[i].size(1)),
        .num_groups = static_cast<int>(groups[i].size(1)),
        .groups_of_factor = static_cast<int>(groups[i].size(1) / factors[i].numel()),
        .height = static_cast<int>(left[i].size(1)),
        .width = static_cast<int>(right[i].size(1)),
        .transposed = transposed[i],
        .left_by_token = left_by_token[i],
        .right_by_token = right_by_token[i],
    };
    partial += partials(i);
  }
  for (size_t i = 0; i < folded.size(); ++i) {
    args.folded.sums[i] = {
        .slots = folded[i].const_data_ptr<float>(),
        .out = sums[left.size() + i].mutable_data_ptr<float>(),
        .size = folded[i].size(1) * folded[i].size(2),
    };
  }
  const Scalar right_dtype = right.empty() ? Scalar::kFloat : scalar_of(right[0]);
  C10_CUDA_CHECK(launch_wgrad(args, right_dtype, c10::cuda::getCurrentCUDAStream()));
  return made;
}

void add_low_rank(const at::Tensor& out, const at::Tensor& u, const at::Tensor& v,
                  const at::Tensor& scaling, const at::Tensor& perm, const at::Tensor& tiles,
                  bool rank_last) {
  const c10::cuda::CUDAGuard guard(out.device());
  outputs::add_low_rank(out, u, v, scaling, perm, tiles, rank_last);
  const AddLowRank args{
      .u = u.const_data_ptr(),
      .v = v.const_data_ptr(),
      .scaling = scaling.const_data_ptr<float>(),
      .perm = perm.const_data_ptr<int64_t>(),
      .tiles = tiles.const_data_ptr<int64_t>(),
      .out = out.mutable_data_ptr(),
      .num_tiles = static_cast<int>(tiles.size(1)),
      .rank = static_cast<int>(u.size(1)),
      .width = static_cast<int>(out.size(1)),
      .rank_last = rank_last,
  };
  C10_CUDA_CHECK(launch_add_low_rank(args, scalar_of(out), scalar_of(v),
                                     c10::cuda::getCurrentCUDAStream()));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> gate_up(
    const at::Tensor& left, const at::Tensor& stack, const std::optional<at::Tensor>& extra,
    const at::Tensor& perm, const at::Tensor& tiles, const at::Tensor& segment_offsets,
    const std::optional<at::Tensor>& u, const std::optional<at::Tensor>& v,
    const std::optional<at::Tensor>& scaling, int64_t block_m, bool save,
    const std::optional<at::Tensor>& down_lora_A) {
  const c10::cuda::CUDAGuard guard(left.device());
  const auto made = outputs::gate_up(left, stack, extra, perm, tiles, segment_offsets, u, v,
                                     scaling, block_m, save, down_lora_A);
  const auto& [pre_act, act, parts] = made;
  const GroupedGemm gemm =
      make_gemm(left, stack, extra, perm, tiles, segment_offsets, u, v, scaling, act.size(1));
  const PartsOfU u2{
      .a = pointer_of(down_lora_A),
      .parts = parts.mutable_data_ptr<float>(),
      .experts = down_lora_A ? static_cast<int>(down_lora_A->size(1)) : 1,
      .rank = static_cast<int>(parts.size(2)),
      .is_float = scalar_of(down_lora_A) == Scalar::kFloat,
  };
  C10_CUDA_CHECK(launch_gate_up(gemm, save ? pre_act.mutable_data_ptr() : nullptr,
                                act.mutable_data_ptr(), u2, scalar_of(left), scalar_of(v),
                                static_cast<int>(block_m), c10::cuda::getCurrentCUDAStream()));
  return made;
}

std::tuple<at::Tensor, at::Tensor> grouped_gemm(
    const at::Tensor& left, const at::Tensor& stack, const std::optional<at::Tensor>& extra,
    const at::Tensor& perm, const at::Tensor& tiles, const at::Tensor& segment_offsets,
    const std::optional<at::Tensor>& u, const std::optional<at::Tensor>& v,
    const std::optional<at::Tensor>& scaling, int64_t block_m, bool transposed, bool save) {
  const c10::cuda::CUDAGuard guard(left.device());
  const auto made = outputs::grouped_gemm(left, stack, extra, perm, tiles, segment_offsets, u, v,
                                          scaling, block_m, transposed, save);
  const auto& [out, sum] = made;
  GroupedGemm gemm =
      make_gemm(left, stack, extra, perm, tiles, segment_offsets, u, v, scaling, out.size(1));
  if (save) gemm.sum = sum.mutable_data_ptr();
  const auto launch = transposed ? launch_down : launch_d_rows;
  C10_CUDA_CHECK(launch(gemm, out.mutable_data_ptr(), scalar_of(left), scalar_of(v),
                        static_cast<int>(block_m), c10::cuda::getCurrentCUDAStream()));
  return made;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>> act_backward(
    const at::Tensor& left, const at::Tensor& stack, const std::optional<at::Tensor>& extra,
    const at::Tensor& perm, const at::Tensor& tiles, const at::Tensor& segment_offsets,
    const std::optional<at::Tensor>& u, const std::optional<at::Tensor>& v,
    const std::optional<at::Tensor>& scaling, int64_t block_m, const at::Tensor& weights,
    const at::Tensor& pre_act, bool act_of_adapted, bool act_of_added,
    const std::optional<at::Tensor>& u1, const std::optional<at::Tensor>& gate_up_lora_B,
    const std::optional<at::Tensor>& gate_up_scaling, const c10::List<bool>& wanted) {
  const c10::cuda::CUDAGuard guard(left.device());
  const auto made = outputs::act_backward(left, stack, extra, perm, tiles, segment_offsets, u, v,
                                          scaling, block_m, weights, pre_act, act_of_adapted,
                                          act_of_added, u1, gate_up_lora_B, gate_up_scaling,
                                          wanted);
  const auto& [d_pre, act, dots, folded] = made;
  const auto place = [](const at::Tensor& tensor) {
    return tensor.size(0) > 0 ? tensor.mutable_data_ptr<float>() : nullptr;
  };
  const GroupedGemm gemm =
      make_gemm(left, stack, extra, perm, tiles, segment_offsets, u, v, scaling, stack.size(2));
  const ActBackward with{
      .weights = weights.const_data_ptr(),
      .pre = pre_act.const_data_ptr(),
      .d_pre = d_pre.mutable_data_ptr(),
      .act = act.mutable_data_ptr(),
      .dots = dots.mutable_data_ptr<float>(),
      .num_rows = perm.numel(),
      .weights_are_float = weights.scalar_type() == at::kFloat,
      .act_of_adapted = act_of_adapted,
      .act_of_added = act_of_added,
      .adapters = {.u1 = pointer_of(u1),
                   .b1 = pointer_of(gate_up_lora_B),
                   .scaling = static_cast<const float*>(pointer_of(gate_up_scaling)),
                   .du1 = place(folded[0]),
                   .d_b1 = place(folded[1]),
                   .d_a2 = place(folded[2]),
                   .rank = u1 ? static_cast<int>(u1->size(1)) : 0,
                   .b_is_float = scalar_of(gate_up_lora_B) == Scalar::kFloat},
  };
  C10_CUDA_CHECK(launch_act_backward(gemm, with, scalar_of(left), scalar_of(v),
                                     static_cast<int>(block_m),
                                     c10::cuda::getCurrentCUDAStream()));
  return made;
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
  const c10::cuda::CUDAGuard guard(hidden_states.device());
  const at::Tensor out = outputs::moe_mlp_inference(
      hidden_states, topk_ids, topk_weights, gate_up_proj, down_proj, modality_ids,
      extra_gate_up_proj, extra_down_proj, gate_up_lora_A, gate_up_lora_B, gate_up_scaling,
      down_lora_A, down_lora_B, down_scaling, gate_up_bias, gate_up_scales, down_scales, act,
      gated, alpha, limit, shift, interleaved);
  const auto size = [](const OptionalTensor& tensor, int64_t dim) {
    return tensor ? static_cast<int>(tensor->size(dim)) : 0;
  };
  const int64_t inter = down_proj.size(2), rank2 = size(down_lora_A, 2);
  const at::Tensor rows = at::empty({topk_ids.numel(), inter}, hidden_states.options());
  const at::Tensor parts = at::empty({topk_ids.numel(), decode_parts(inter), rank2},
                                     hidden_states.options().dtype(at::kFloat));
  const Decode args{
      .topk_ids = topk_ids.const_data_ptr<int64_t>(),
      .modality_ids = modality_ids ? modality_ids->const_data_ptr<int64_t>() : nullptr,
      .topk_weights = topk_weights.const_data_ptr(),
      .hidden_states = hidden_states.const_data_ptr(),
      .gate_up = gate_up_proj.const_data_ptr(),
      .down = down_proj.const_data_ptr(),
      .extra_gate_up = pointer_of(extra_gate_up_proj),
      .extra_down = pointer_of(extra_down_proj),
      .a1 = pointer_of(gate_up_lora_A),
      .b1 = pointer_of(gate_up_lora_B),
      .scaling1 = static_cast<const float*>(pointer_of(gate_up_scaling)),
      .a2 = pointer_of(down_lora_A),
      .b2 = pointer_of(down_lora_B),
      .scaling2 = static_cast<const float*>(pointer_of(down_scaling)),
      .act = rows.mutable_data_ptr(),
      .parts = parts.mutable_data_ptr<float>(),
      .out = out.mutable_data_ptr(),
      .tokens = static_cast<int>(topk_ids.size(0)),
      .top_k = static_cast<int>(topk_ids.size(1)),
      .num_base = static_cast<int>(gate_up_proj.size(0)),
      .num_experts = static_cast<int>(gate_up_proj.size(0)) + size(extra_gate_up_proj, 0),
      .num_modalities = gate_up_lora_A ? size(gate_up_lora_A, 0) : size(down_lora_A, 0),
      .hidden = static_cast<int>(hidden_states.size(1)),
      .inter = static_cast<int>(inter),
      .rank1 = size(gate_up_lora_A, 2),
      .rank2 = static_cast<int>(rank2),
      .experts_of_a1 = size(gate_up_lora_A, 1),
      .experts_of_a2 = size(down_lora_A, 1),
      .weights_are_float = scalar_of(topk_weights) == Scalar::kFloat,
      .extra_is_float =
          extra_gate_up_proj && scalar_of(*extra_gate_up_proj) == Scalar::kFloat,
      .is_float1 = scalar_of(gate_up_lora_A) == Scalar::kFloat,
      .is_float2 = scalar_of(down_lora_A) == Scalar::kFloat,
  };
  C10_CUDA_CHECK(launch_decode(args, scalar_of(hidden_states), c10::cuda::getCurrentCUDAStream()));
  return out;
}

namespace {

constexpr course::Launches kLaunches = {dispatch_with_maps, tile_maps,    shrink, gate_up,
                                        grouped_gemm,       act_backward, wgrad,  combine};
[[maybe_unused]] const bool kUsed = (course::on_device = &kLaunches, true);

}  // namespace
}  // namespace moe_kernels::cuda
