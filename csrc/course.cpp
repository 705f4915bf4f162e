// A layer's forward and its backward in one op each: the course that
// moe_kernels/ops/moe_mlp/gpu.py defines, with the launches of the ops on CUDA. On tensors without
// memory it makes the ops' checks and outputs alone.
//
// Notation: dA' is the gradient of the activation without the routing weight; du = dy B.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/ones.h>

#include <string>

#include "checks.h"
#include "cuda/plan.h"
#include "layer.h"
#include "ops.h"

namespace moe_kernels::course {

const Launches* on_device = nullptr;

namespace {

constexpr Launches kWithoutMemory = {
    outputs::dispatch_with_maps, outputs::tile_maps,    outputs::shrink, outputs::gate_up,
    outputs::grouped_gemm,       outputs::act_backward, outputs::wgrad,  outputs::combine};

struct Map {
  at::Tensor tiles, groups;
  int64_t block;
};

Map map_of(const std::vector<at::Tensor>& made, size_t index, const cuda::MapRequest& request) {
  return {made[2 * index], made[2 * index + 1], request.block};
}

// The rows sorted by expert and modality.
struct Sorted {
  at::Tensor perm, inv_perm, segment_offsets;
  Map experts, pairs;  // see Plan

  at::Tensor num_dispatched() const { return segment_offsets.slice(0, -1); }
};

cuda::LayerShapes shapes_of(const Layer& layer) {
  return {
      .tokens = layer.topk_weights.size(0),
      .top_k = layer.topk_weights.size(1),
      .hidden = layer.down_proj.base.size(1),
      .inter = layer.down_proj.base.size(2),
      .num_base = layer.num_base(),
      .num_added = layer.num_added(),
      .modalities = layer.num_modalities(),
      .rank1 = layer.gate_up_lora.rank(),
      .rank2 = layer.down_lora.rank(),
  };
}

const Launches& launches_of(const Layer& layer) {
  if (layer.hidden_states.is_meta()) return kWithoutMemory;
  // Another tensor without memory brings a layer here in a build without kernels.
  TORCH_CHECK(on_device != nullptr, "all tensors must be on meta, hidden_states is on ",
              layer.hidden_states.device());
  return *on_device;
}

// What the two halves share: the launches that occur in both.
struct Course {
  const Layer& layer;
  const cuda::LayerShapes shapes;
  const cuda::Plan plan;
  const Launches& launches;

  explicit Course(const Layer& of)
      : layer(of),
        shapes(shapes_of(of)),
        plan(shapes),
        launches(launches_of(of)) {}

  at::Tensor empty(int64_t columns, at::ScalarType dtype) const {
    return at::empty({shapes.rows(), columns}, layer.hidden_states.options().dtype(dtype));
  }

  // Writes left M to the adapted rows of `out`, and zeros to the others if `fill`.
  void shrink(const Sorted& sorted, const at::Tensor& out, const at::Tensor& left,
              const at::Tensor& matrix, bool by_token, bool rank_first, bool fill) const {
    const OptionalTensor segments = fill ? OptionalTensor(sorted.segment_offsets) : std::nullopt;
    launches.shrink(out, left, matrix, sorted.perm, sorted.pairs.tiles, segments,
                    sorted.pairs.groups.size(1), shapes.num_base, matrix.size(1), shapes.top_k,
                    by_token, rank_first);
  }

  // Returns the product, and the sum of the parts of u if it is to be saved.
  std::tuple<at::Tensor, at::Tensor> grouped_gemm(const Sorted& sorted, const at::Tensor& left,
                                                  const ExpertStack& stack,
                                                  const OptionalTensor& u, const LowRankPair& pair,
                                                  bool transposed, bool save) const {
    return launches.grouped_gemm(
        left, stack.base, stack.extra(), sorted.perm, sorted.experts.tiles, sorted.segment_offsets,
        u, u ? (transposed ? pair.b : pair.a) : std::nullopt, u ? pair.scaling : std::nullopt,
        sorted.experts.block, transposed, save);
  }

  at::Tensor combine(const Sorted& sorted, const at::Tensor& rows,
                     const OptionalTensor& weights) const {
    return launches.combine(rows, sorted.inv_perm, sorted.num_dispatched(), weights,
                            shapes.tokens);
  }
};

// ---- Forward

// Returns u = left A^T (T * K, r), or nothing without adapters. What is saved has zeros in rows
// without an adapter: an op's output is a function of its inputs.
OptionalTensor shrink_to_u(const Course& course, const Sorted& sorted, const at::Tensor& left,
                           const LowRankPair& pair, bool by_token, bool save) {
  if (!pair.a) return std::nullopt;
  const at::Tensor u = course.empty(pair.rank(), left.scalar_type());
  course.shrink(sorted, u, left, *pair.a, by_token, /*rank_first=*/true, /*fill=*/save);
  return u;
}

Sorted sort(const Course& course, const at::Tensor& topk_ids, const OptionalTensor& modality_ids) {
  const cuda::Plan& plan = course.plan;
  const cuda::RequestedMaps maps{&plan.experts, &plan.pairs};
  const auto [perm, inv_perm, tokens, experts, segment_offsets, made] =
      course.launches.dispatch_with_maps(topk_ids, course.shapes.num_experts(), modality_ids,
                                         course.shapes.modalities, maps.blocks, maps.groups);
  return {perm, inv_perm, segment_offsets, map_of(made, 0, plan.experts),
          map_of(made, 1, plan.pairs)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
forward(const Layer& layer, const at::Tensor& topk_ids, const OptionalTensor& modality_ids,
        bool save) {
  const Course course(layer);
  const at::Tensor& x = layer.hidden_states;
  const LowRankPair &up = layer.gate_up_lora, &down = layer.down_lora;
  const Sorted sorted = sort(course, topk_ids, modality_ids);
  const OptionalTensor u1 = shrink_to_u(course, sorted, x, up, /*by_token=*/true, save);
  const bool in_parts = course.plan.u2_in_parts;
  const auto [pre_act, act, parts] = course.launches.gate_up(
      x, layer.gate_up_proj.base, layer.gate_up_proj.extra(), sorted.perm, sorted.experts.tiles,
      sorted.segment_offsets, u1, up.b, up.scaling, sorted.experts.block, save,
      in_parts ? down.a : std::nullopt);
  const OptionalTensor u2 =
      in_parts ? parts : shrink_to_u(course, sorted, act, down, /*by_token=*/false, save);
  const auto [rows, sum] = course.grouped_gemm(sorted, act, layer.down_proj, u2, down,
                                               /*transposed=*/true, save && in_parts);
  const at::Tensor out = course.combine(sorted, rows, layer.topk_weights);
  const auto saved_u = [&](const OptionalTensor& u, int64_t rank) {
    return u && save ? *u : at::empty({save ? course.shapes.rows() : 0, rank}, x.options());
  };
  const auto saved = [&](const at::Tensor& of_dispatch) {
    return save ? of_dispatch : at::empty({0}, of_dispatch.options());
  };
  return {out,
          pre_act,
          saved_u(u1, up.rank()),
          in_parts ? sum : saved_u(u2, down.rank()),
          saved(sorted.perm),
          saved(sorted.inv_perm),
          saved(sorted.segment_offsets)};
}

// ---- Backward

struct Needs {
  bool hidden, weights, added_gate_up, added_down, a1, b1, a2, b2;

  explicit Needs(const c10::List<bool>& flags)
      : hidden(flags[0]),
        weights(flags[1]),
        added_gate_up(flags[2]),
        added_down(flags[3]),
        a1(flags[4]),
        b1(flags[5]),
        a2(flags[6]),
        b2(flags[7]) {}
  bool added() const { return added_gate_up || added_down; }
  bool du1() const { return hidden || a1; }
  bool any() const { return hidden || weights || added() || a1 || b1 || a2 || b2; }
};

// A problem of wgrad: sums of (factor * weight * left)^T right over each group's rows.
struct Sum {
  at::Tensor left, right;
  const Map& rows;
  at::Tensor factors;
  OptionalTensor weights;
  bool transposed = false, left_by_token = false, right_by_token = false;
};

struct Sums {
  std::vector<at::Tensor> sums;  // of each problem
  at::Tensor du, sum_of_dots;
};

struct Backward {
  const Course course;
  const Layer& layer;
  const Needs needs;
  const int64_t frozen_extra;
  const at::Tensor &grad_out, &pre_act, &u1, &u2;
  const cuda::LayerShapes& shapes = course.shapes;
  Sorted sorted = {};
  Map chunks = {}, added = {};  // see Plan

  void make_maps() {
    const cuda::Plan& plan = course.plan;
    const bool all_added = needs.added() && frozen_extra == 0;
    const cuda::RequestedMaps maps =
        all_added ? cuda::RequestedMaps{&plan.experts, &plan.pairs, &plan.chunks, &plan.added}
                  : cuda::RequestedMaps{&plan.experts, &plan.pairs, &plan.chunks};
    const auto made = tile_maps(sorted.segment_offsets, maps);
    sorted.experts = map_of(made, 0, plan.experts);
    sorted.pairs = map_of(made, 1, plan.pairs);
    chunks = map_of(made, 2, plan.chunks);
    if (all_added) {
      added = map_of(made, 3, plan.added);
    } else if (needs.added()) {
      // Groups without rows: no work, and zeros in the tensor of all added experts.
      const at::Tensor first_trained = sorted.segment_offsets.select(
          0, (shapes.num_base + frozen_extra) * shapes.segments_of_expert());
      const at::Tensor without = at::maximum(sorted.segment_offsets, first_trained);
      added = map_of(tile_maps(without, cuda::RequestedMaps{&plan.added}), 0, plan.added);
    }
  }

  std::vector<at::Tensor> tile_maps(const at::Tensor& segment_offsets,
                                    const cuda::RequestedMaps& maps) const {
    return course.launches.tile_maps(segment_offsets, shapes.rows(), maps.blocks, maps.groups);
  }

  // Returns du = dy B (T * K, r) in float32, written on adapted rows alone; nothing without
  // adapters.
  OptionalTensor shrink_to_du(const at::Tensor& dy, const LowRankPair& pair, bool by_token) const {
    if (!pair.b) return std::nullopt;
    const at::Tensor du = course.empty(pair.rank(), at::kFloat);
    course.shrink(sorted, du, dy, *pair.b, by_token, /*rank_first=*/false, /*fill=*/false);
    return du;
  }

  // Sums the problems in two launches. With a matrix, which is of the first, du is right matrix.
  // Behind the sums of the problems come those of what act_backward has folded.
  Sums wgrad(const std::vector<Sum>& problems, const OptionalTensor& matrix = std::nullopt,
             const OptionalTensor& dots = std::nullopt,
             const std::vector<at::Tensor>& folded = {}) const {
    std::vector<at::Tensor> slots;
    if (!folded.empty() && needs.b1) slots.push_back(folded[1]);
    if (!folded.empty() && needs.a2) slots.push_back(folded[2]);
    if (problems.empty() && !dots && slots.empty()) return {};
    std::vector<at::Tensor> left, right, tiles, groups, factors;
    c10::List<OptionalTensor> weights;
    std::vector<int64_t> blocks;
    c10::List<bool> transposed, left_by_token, right_by_token;
    for (const Sum& problem : problems) {
      left.push_back(problem.left);
      right.push_back(problem.right);
      tiles.push_back(problem.rows.tiles);
      groups.push_back(problem.rows.groups);
      factors.push_back(problem.factors);
      weights.push_back(problem.weights);
      blocks.push_back(problem.rows.block);
      transposed.push_back(problem.transposed);
      left_by_token.push_back(problem.left_by_token);
      right_by_token.push_back(problem.right_by_token);
    }
    const auto [sums, du, sum_of_dots] = course.launches.wgrad(
        left, right, tiles, groups, factors, weights, matrix, blocks, transposed, left_by_token,
        right_by_token, sorted.perm, dots, layer.topk_weights.scalar_type(), shapes.top_k, slots,
        sorted.segment_offsets, shapes.num_base, shapes.modalities);
    return {sums, du, sum_of_dots};
  }

  Sum sum_for_b1(const at::Tensor& d_pre) const {
    return {u1, d_pre, chunks, *layer.gate_up_lora.scaling, std::nullopt, /*transposed=*/true};
  }
  Sum sum_for_a1(const at::Tensor& du1) const {
    return {du1,   layer.hidden_states, chunks, *layer.gate_up_lora.scaling, std::nullopt,
            false, /*left_by_token=*/false, /*right_by_token=*/true};
  }
  Sum sum_for_b2() const {
    return {u2,
            grad_out,
            chunks,
            *layer.down_lora.scaling,
            layer.topk_weights,
            /*transposed=*/true,
            /*left_by_token=*/false,
            /*right_by_token=*/true};
  }
  Sum sum_for_a2(const at::Tensor& du2, const at::Tensor& act) const {
    return {du2, act, chunks, *layer.down_lora.scaling, layer.topk_weights};
  }

  // Returns the gradients of both weights of the added experts that are needed.
  std::vector<at::Tensor> of_added(const at::Tensor& d_pre, const at::Tensor& act) const {
    if (!needs.added()) return {};
    const at::Tensor one = at::ones({1}, d_pre.options().dtype(at::kFloat));
    std::vector<Sum> problems;
    if (needs.added_gate_up) {
      problems.push_back({d_pre, layer.hidden_states, added, one, std::nullopt, false,
                          /*left_by_token=*/false, /*right_by_token=*/true});
    }
    if (needs.added_down) {
      problems.push_back(
          {grad_out, act, added, one, layer.topk_weights, false, /*left_by_token=*/true});
    }
    return wgrad(problems).sums;
  }

  // Returns dA from each pair's sums: (M, E, r, n), or (M, 1, r, n) where experts share A.
  at::Tensor of_a(const at::Tensor& sums, const at::Tensor& a) const {
    const at::Tensor grad =
        sums.view({shapes.modalities, shapes.num_base, a.size(2), a.size(3)});
    return a.size(1) == shapes.num_base ? grad : grad.sum(1, /*keepdim=*/true);
  }

  // Whether dA' leaves what the gradients of adapters need of its tiles.
  bool folds() const { return course.plan.folds && (needs.hidden || needs.b1 || needs.a2); }

  // What follows from dO W2: see ActBackwardOp.
  auto act_backward(const OptionalTensor& du2) const {
    const LowRankPair &up = layer.gate_up_lora, &down = layer.down_lora;
    const auto if_folds = [&](const OptionalTensor& tensor) {
      return folds() ? tensor : std::nullopt;
    };
    return course.launches.act_backward(
        grad_out, layer.down_proj.base, layer.down_proj.extra(), sorted.perm, sorted.experts.tiles,
        sorted.segment_offsets, du2, down.a, down.scaling, sorted.experts.block,
        layer.topk_weights, pre_act, needs.a2 && !folds(), needs.added_down, if_folds(u1),
        if_folds(up.b), if_folds(up.scaling), c10::List<bool>({needs.hidden, needs.b1, needs.a2}));
  }

  // Returns dB1, dA2, du1 and the sum of dots, where dA' has left nothing of these.
  Sums first_sums(const at::Tensor& d_pre, const at::Tensor& act, const OptionalTensor& du2,
                  const OptionalTensor& dots) const {
    const LowRankPair& up = layer.gate_up_lora;
    const bool together = needs.du1() && up.a && needs.b1 && course.plan.du_with_dB;
    std::vector<Sum> problems;
    if (needs.b1) problems.push_back(sum_for_b1(d_pre));
    if (needs.a2) problems.push_back(sum_for_a2(*du2, act));
    const auto matrix = together ? OptionalTensor(up.b->flatten(0, 1)) : std::nullopt;
    Sums sums = wgrad(problems, matrix, dots);
    if (needs.du1() && up.a && !together) sums.du = *shrink_to_du(d_pre, up, /*by_token=*/false);
    return sums;
  }

  std::vector<at::Tensor> run() {
    make_maps();
    const LowRankPair &up = layer.gate_up_lora, &down = layer.down_lora;
    const OptionalTensor du2 = shrink_to_du(grad_out, down, /*by_token=*/true);
    const auto [d_pre, act, parts_of_dots, folded] = act_backward(du2);
    const OptionalTensor dots = needs.weights ? OptionalTensor(parts_of_dots) : std::nullopt;
    Sums first;
    if (!folds()) {
      first = first_sums(d_pre, act, du2, dots);
    } else if (needs.hidden) {
      first.du = folded[0];
    } else if (needs.a1) {
      first.du = *shrink_to_du(d_pre, up, /*by_token=*/false);
    }

    std::vector<at::Tensor> grads;
    if (needs.hidden) {
      const bool save = folds() && needs.a1;
      const auto [d_rows, du1] =
          course.grouped_gemm(sorted, d_pre, layer.gate_up_proj,
                              up.a ? OptionalTensor(first.du) : std::nullopt, up,
                              /*transposed=*/false, save);
      if (save) first.du = du1;
      grads.push_back(course.combine(sorted, d_rows, /*weights=*/std::nullopt));
    }
    std::vector<Sum> problems;
    if (needs.a1) problems.push_back(sum_for_a1(first.du));
    if (needs.b2) problems.push_back(sum_for_b2());
    Sums last = folds() ? wgrad(problems, std::nullopt, dots, folded) : wgrad(problems);
    if (folds()) {
      first.sum_of_dots = last.sum_of_dots;
      first.sums = {last.sums.begin() + problems.size(), last.sums.end()};
      last.sums.resize(problems.size());
    }
    if (needs.weights) grads.push_back(first.sum_of_dots);
    for (const at::Tensor& grad : of_added(d_pre, act)) grads.push_back(grad);
    if (needs.a1) grads.push_back(of_a(last.sums.front(), *up.a));
    if (needs.b1) grads.push_back(first.sums.front().view(up.b->sizes()));
    if (needs.a2) grads.push_back(of_a(first.sums.back(), *down.a));
    if (needs.b2) grads.push_back(last.sums.back().view(down.b->sizes()));
    return grads;
  }
};

// Checks what only the backward takes.
void check_backward(const Backward& backward) {
  const Layer& layer = backward.layer;
  const cuda::LayerShapes& of = backward.shapes;
  const Needs& needs = backward.needs;
  TORCH_CHECK(layer.gate_up_proj.added || !needs.added(),
              "needs asks for gradients of extra experts, but there are none");
  TORCH_CHECK(backward.frozen_extra >= 0 && backward.frozen_extra <= of.num_added,
              "frozen_extra must be in 0..", of.num_added, ", is ", backward.frozen_extra);
  TORCH_CHECK(layer.gate_up_lora.a || !(needs.a1 || needs.b1),
              "needs asks for gradients of the gate_up adapters, but there are none");
  TORCH_CHECK(layer.down_lora.a || !(needs.a2 || needs.b2),
              "needs asks for gradients of the down adapters, but there are none");
  const at::Tensor& x = layer.hidden_states;
  const auto check = [&](const at::Tensor& tensor, const char* name, int64_t rows,
                         int64_t columns) {
    check_like(x, tensor, name, x.scalar_type(), {rows, columns});
  };
  check(backward.grad_out, "grad_out", of.tokens, of.hidden);
  check(backward.pre_act, "pre_act", of.rows(), 2 * of.inter);
  check(backward.u1, "u1", of.rows(), of.rank1);
  check(backward.u2, "u2", of.rows(), of.rank2);
  const Sorted& sorted = backward.sorted;
  check_like(x, sorted.perm, "perm", at::kLong, {of.rows()});
  check_like(x, sorted.inv_perm, "inv_perm", at::kLong, {of.rows()});
  check_like(x, sorted.segment_offsets, "segment_offsets", at::kLong,
             {of.num_experts() * of.segments_of_expert() + 1});
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
    bool gated, double, double, double, bool interleaved, bool save_for_backward) {
  const at::AutoDispatchBelowADInplaceOrView no_derivatives;
  const Layer layer = fitting(Layer{hidden_states,
                                topk_weights,
                                {gate_up_proj, extra_gate_up_proj},
                                {down_proj, extra_down_proj},
                                {gate_up_lora_A, gate_up_lora_B, gate_up_scaling},
                                {down_lora_A, down_lora_B, down_scaling},
                                gate_up_bias,
                                gate_up_scales,
                                down_scales,
                                act,
                                gated,
                                interleaved});
  check_like(layer.hidden_states, topk_ids, "topk_ids", at::kLong,
             {layer.topk_weights.size(0), layer.topk_weights.size(1)});
  return forward(layer, topk_ids, modality_ids, save_for_backward);
}

std::vector<at::Tensor> moe_mlp_backward(
    const at::Tensor& grad_out, const at::Tensor& hidden_states, const at::Tensor& topk_weights,
    const at::Tensor& perm, const at::Tensor& inv_perm, const at::Tensor& segment_offsets,
    const at::Tensor& gate_up_proj, const at::Tensor& down_proj,
    const OptionalTensor& extra_gate_up_proj, const OptionalTensor& extra_down_proj,
    const OptionalTensor& gate_up_lora_A, const OptionalTensor& gate_up_lora_B,
    const OptionalTensor& gate_up_scaling, const OptionalTensor& down_lora_A,
    const OptionalTensor& down_lora_B, const OptionalTensor& down_scaling,
    const OptionalTensor& gate_up_bias, const OptionalTensor& gate_up_scales,
    const OptionalTensor& down_scales, std::string_view act, bool gated, double, double, double,
    bool interleaved, const at::Tensor& pre_act, const at::Tensor& u1, const at::Tensor& u2,
    int64_t num_modalities, const c10::List<bool>& needs, int64_t frozen_extra) {
  const at::AutoDispatchBelowADInplaceOrView no_derivatives;
  const Layer layer = fitting(Layer{hidden_states,
                                topk_weights,
                                {gate_up_proj, extra_gate_up_proj},
                                {down_proj, extra_down_proj},
                                {gate_up_lora_A, gate_up_lora_B, gate_up_scaling},
                                {down_lora_A, down_lora_B, down_scaling},
                                gate_up_bias,
                                gate_up_scales,
                                down_scales,
                                act,
                                gated,
                                interleaved});
  TORCH_CHECK(num_modalities == layer.num_modalities(), "num_modalities must be that of the ",
              "adapters, ", layer.num_modalities(), ", is ", num_modalities);
  TORCH_CHECK(needs.size() == 8, "needs must have an entry for each of 8 tensors");
  const at::Tensor grad = fitting(grad_out);
  Backward backward{Course(layer), layer, Needs(needs), frozen_extra, grad, pre_act, u1, u2};
  backward.sorted = {perm, inv_perm, segment_offsets, {}, {}};
  check_backward(backward);
  return backward.needs.any() ? backward.run() : std::vector<at::Tensor>();
}

}  // namespace moe_kernels::course
