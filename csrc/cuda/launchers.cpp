// The CUDA kernels as ops: checks, outputs, streams. Only here do torch and CUDA meet.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <limits>

#include "../checks.h"
#include "../ops.h"
#include "combine.h"
#include "dispatch.h"

namespace moe_kernels::cuda {
namespace {

Scalar scalar_of(const at::Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return Scalar::kFloat;
    case at::kHalf:
      return Scalar::kHalf;
    case at::kBFloat16:
      return Scalar::kBFloat16;
    default:
      TORCH_CHECK(false, name, " must be float32, float16 or bfloat16, is ", tensor.scalar_type());
  }
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> dispatch(
    const at::Tensor& topk_ids, int64_t num_experts, const std::optional<at::Tensor>& modality_ids,
    int64_t num_modalities) {
  check_layout(topk_ids, "topk_ids", at::kCUDA, at::kLong, {-1, -1});
  if (modality_ids) {
    check_layout(*modality_ids, "modality_ids", at::kCUDA, at::kLong, {topk_ids.size(0)});
    TORCH_CHECK(modality_ids->device() == topk_ids.device(), "modality_ids must be on ",
                topk_ids.device(), ", is on ", modality_ids->device());
  }
  constexpr int64_t kMost = std::numeric_limits<int>::max();
  TORCH_CHECK(num_experts >= 1 && num_modalities >= 0 && topk_ids.size(1) >= 1 &&
                  topk_ids.numel() < kMost && num_experts < 1 << 16 && num_modalities < 1 << 14,
              "dispatch takes at least one expert of each token, fewer than 2^31 rows, 2^16 experts "
              "and 2^14 modalities");
  const c10::cuda::CUDAGuard guard(topk_ids.device());
  const Sort sort = make_sort(topk_ids.const_data_ptr<int64_t>(),
                              modality_ids ? modality_ids->const_data_ptr<int64_t>() : nullptr,
                              static_cast<int>(topk_ids.numel()),
                              static_cast<int>(topk_ids.size(1)), static_cast<int>(num_experts),
                              static_cast<int>(num_modalities));
  const auto options = topk_ids.options();
  const at::Tensor perm = at::empty({topk_ids.numel()}, options), inv_perm = at::empty_like(perm);
  const at::Tensor tokens = at::empty({num_experts}, options);
  const at::Tensor experts = at::empty({num_experts + 1}, options);
  const at::Tensor segments = at::empty({sort.num_segments() + 1}, options);
  const at::Tensor counts = at::empty({static_cast<int64_t>(sort.num_blocks) * sort.num_keys()},
                                      options.dtype(at::kInt));
  const DispatchOut out{perm.mutable_data_ptr<int64_t>(),     inv_perm.mutable_data_ptr<int64_t>(),
                        tokens.mutable_data_ptr<int64_t>(),   experts.mutable_data_ptr<int64_t>(),
                        segments.mutable_data_ptr<int64_t>(), nullptr,
                        nullptr};
  C10_CUDA_CHECK(launch_dispatch(sort, counts.mutable_data_ptr<int>(), out, {}, {},
                                 c10::cuda::getCurrentCUDAStream()));
  return {perm, inv_perm, tokens, experts, segments};
}

at::Tensor combine(const at::Tensor& rows, const at::Tensor& inv_perm, const at::Tensor& num_rows,
                   const std::optional<at::Tensor>& weights, int64_t num_tokens) {
  const Scalar scalar = scalar_of(rows, "rows");
  check_layout(rows, "rows", at::kCUDA, rows.scalar_type(), {-1, -1});
  check_layout(inv_perm, "inv_perm", at::kCUDA, at::kLong, {rows.size(0)});
  check_layout(num_rows, "num_rows", at::kCUDA, at::kLong, {1});
  TORCH_CHECK(num_tokens >= 0 && (num_tokens == 0 ? rows.size(0) == 0
                                                  : rows.size(0) % num_tokens == 0),
              "rows must be as many for each of ", num_tokens, " tokens, there are ", rows.size(0));
  const int64_t top_k = num_tokens == 0 ? 1 : rows.size(0) / num_tokens;
  if (weights) {
    check_layout(*weights, "weights", at::kCUDA, weights->scalar_type(), {num_tokens, -1});
    TORCH_CHECK(weights->numel() == rows.size(0), "weights must have an entry for each row");
  }
  const int64_t width = rows.size(1);
  TORCH_CHECK(width % combine_vector(scalar) == 0 &&
                  reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % 16 == 0 &&
                  width < std::numeric_limits<int>::max(),
              "rows must be aligned to 16 bytes, each of them");
  const c10::cuda::CUDAGuard guard(rows.device());
  const at::Tensor out = at::empty({num_tokens, width}, rows.options());
  const Combine given{rows.const_data_ptr(),
                      inv_perm.const_data_ptr<int64_t>(),
                      num_rows.const_data_ptr<int64_t>(),
                      weights ? weights->const_data_ptr() : nullptr,
                      out.mutable_data_ptr(),
                      num_tokens,
                      static_cast<int>(width),
                      static_cast<int>(top_k)};
  C10_CUDA_CHECK(launch_combine(given, scalar,
                                weights ? scalar_of(*weights, "weights") : Scalar::kFloat,
                                c10::cuda::getCurrentCUDAStream()));
  return out;
}

}  // namespace moe_kernels::cuda
