#include <algorithm>
#include <vector>

#include "../checks.h"
#include "../ops.h"
#include "alloc.h"

namespace moe_kernels::cpu {
namespace {

constexpr int64_t kMaxSegments = int64_t{1} << 32;

// Sort key of a row: by expert, then by modality; -1 for the tail.
struct Keys {
  const int64_t* topk_ids;
  const int64_t* modality_ids;  // null: every row is text
  int64_t top_k;
  int64_t num_experts;
  int64_t num_modalities;

  int64_t operator()(int64_t slot) const {
    const int64_t expert = topk_ids[slot];
    const int64_t modality = modality_ids ? modality_ids[slot / top_k] : 0;
    if (modality < 0 || expert < 0 || expert >= num_experts) return -1;
    return expert * (num_modalities + 1) + modality;
  }
};

void check_modality_ids(const at::Tensor& modality_ids, int64_t num_modalities) {
  if (modality_ids.numel() == 0) return;
  const int64_t* values = modality_ids.const_data_ptr<int64_t>();
  const auto [low, high] = std::minmax_element(values, values + modality_ids.numel());
  TORCH_CHECK_VALUE(*low >= -1 && *high <= num_modalities, "modality_ids must be in -1..",
                    num_modalities, " (-1 padding, 0 the base modality, then ", num_modalities,
                    " added), got ", *low, "..", *high);
}

// offsets[key] = number of rows with a smaller key.
void count_segments(const Keys& keys, int64_t num_rows, int64_t* offsets, int64_t num_segments) {
  std::fill(offsets, offsets + num_segments + 1, 0);
  for (int64_t slot = 0; slot < num_rows; ++slot) {
    const int64_t key = keys(slot);
    if (key >= 0) ++offsets[key + 1];
  }
  for (int64_t s = 0; s < num_segments; ++s) offsets[s + 1] += offsets[s];
}

void place_rows(const Keys& keys, int64_t num_rows, const int64_t* offsets, int64_t num_segments,
                int64_t* perm, int64_t* inv_perm) {
  std::vector<int64_t> next(offsets, offsets + num_segments);
  int64_t tail = offsets[num_segments];
  for (int64_t slot = 0; slot < num_rows; ++slot) {
    const int64_t key = keys(slot);
    const int64_t p = key >= 0 ? next[key]++ : tail++;
    perm[p] = slot;
    inv_perm[slot] = p;
  }
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> dispatch(
    const at::Tensor& topk_ids, int64_t num_experts, const std::optional<at::Tensor>& modality_ids,
    int64_t num_modalities) {
  check_tensor(topk_ids, "topk_ids", at::kLong, {-1, -1});
  TORCH_CHECK(num_experts >= 1, "num_experts must be positive, is ", num_experts);
  int64_t num_segments = 0;
  TORCH_CHECK(num_modalities >= 0 && num_modalities < kMaxSegments &&
                  !__builtin_mul_overflow(num_experts, num_modalities + 1, &num_segments) &&
                  num_segments <= kMaxSegments,
              "num_modalities must be at least 0 and leave no more than ", kMaxSegments,
              " pairs of an expert and a modality, is ", num_modalities);
  const int64_t num_tokens = topk_ids.size(0), top_k = topk_ids.size(1);
  TORCH_CHECK(top_k >= 1, "topk_ids must name at least one expert per token");
  if (modality_ids) {
    check_tensor(*modality_ids, "modality_ids", at::kLong, {num_tokens});
    check_modality_ids(*modality_ids, num_modalities);
  }
  const Keys keys{topk_ids.const_data_ptr<int64_t>(),
                  modality_ids ? modality_ids->const_data_ptr<int64_t>() : nullptr, top_k,
                  num_experts, num_modalities};
  const int64_t num_rows = num_tokens * top_k;

  at::Tensor perm = empty({num_rows}, at::kLong);
  at::Tensor inv_perm = empty({num_rows}, at::kLong);
  at::Tensor tokens_per_expert = empty({num_experts}, at::kLong);
  at::Tensor expert_offsets = empty({num_experts + 1}, at::kLong);
  at::Tensor segment_offsets = empty({num_segments + 1}, at::kLong);
  int64_t* segments = segment_offsets.mutable_data_ptr<int64_t>();
  count_segments(keys, num_rows, segments, num_segments);
  place_rows(keys, num_rows, segments, num_segments, perm.mutable_data_ptr<int64_t>(),
             inv_perm.mutable_data_ptr<int64_t>());

  int64_t* experts = expert_offsets.mutable_data_ptr<int64_t>();
  for (int64_t e = 0; e <= num_experts; ++e) experts[e] = segments[e * (num_modalities + 1)];
  int64_t* counts = tokens_per_expert.mutable_data_ptr<int64_t>();
  for (int64_t e = 0; e < num_experts; ++e) counts[e] = experts[e + 1] - experts[e];
  return {perm, inv_perm, tokens_per_expert, expert_offsets, segment_offsets};
}

}  // namespace moe_kernels::cpu
