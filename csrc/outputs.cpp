// Checks and outputs of the ops of the backend "cuda". Nothing here needs CUDA, so every build has
// the ops' meta kernels, and tests see the refusals without a GPU.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <limits>
#include <string>

#include "checks.h"
#include "cuda/decode_shapes.h"
#include "cuda/grouped_gemm_shapes.h"
#include "cuda/host_device.h"
#include "cuda/tiles.h"
#include "ops.h"

namespace moe_kernels::outputs {
namespace {

constexpr int64_t kMaxInt = std::numeric_limits<int>::max();
constexpr int64_t kMaxGrid = 65535;  // blocks along the second and third axis

cuda::Scalar scalar_of(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kHalf       ? cuda::Scalar::kHalf
         : tensor.scalar_type() == at::kBFloat16 ? cuda::Scalar::kBFloat16
                                                 : cuda::Scalar::kFloat;
}

void check_half_or_float(const at::Tensor& tensor, const char* name) {
  const at::ScalarType dtype = tensor.scalar_type();
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf, name,
              " must be float32, bfloat16 or float16, is ", dtype);
}

// Arguments that the grouped GEMMs share.
struct Experts {
  const at::Tensor &left, &stack;
  const std::optional<at::Tensor>& extra;
  const at::Tensor &perm, &tiles, &segment_offsets;
  const std::optional<at::Tensor>&u, &v, &scaling;
  int64_t block_m;
};

void check_groups(at::IntArrayRef numbers, size_t map, int64_t num_segments) {
  const at::IntArrayRef groups = numbers.slice(5 * map, 5);
  const int64_t num = groups[0], period = groups[1], stride = groups[2], offset = groups[3];
  bool valid = num >= 0 && num <= cuda::kMaxKeys && (num == 0 || period >= 1);
  for (const int64_t number : groups) valid &= number >= 0 && number < kMaxInt;
  // The last group of a period, in the last period, must not begin behind the last segment.
  valid = valid &&
          (num == 0 || (std::min(num, period) - 1) * stride + (num - 1) / period + offset <=
                           num_segments);
  TORCH_CHECK(valid, "groups of map ", map, " must be at most ", cuda::kMaxKeys,
              ", and begin with segments of 0..", num_segments, "; they are ", groups);
}

// Checks that `tensor` is float32 or has the dtype of the rows that it multiplies.
void check_float_or_like(const at::Tensor& rows, const at::Tensor& tensor, const char* name,
                         std::initializer_list<int64_t> sizes) {
  check_float_or(rows.scalar_type(), rows, tensor, name, sizes);
}

// Returns the number of sorted rows in `perm`, each of a token and one of its top_k experts.
int64_t check_perm(const at::Tensor& first, const at::Tensor& perm, int64_t top_k) {
  check_like(first, perm, "perm", at::kLong, {-1});
  TORCH_CHECK(top_k >= 1 && perm.numel() % top_k == 0 && perm.numel() < kMaxInt,
              "perm must have top_k = ", top_k, " entries for each token, and fewer than 2^31");
  return perm.numel();
}

// Returns the number of modalities of (..., height, width), with `experts` matrices for each.
int64_t check_matrices(const at::Tensor& rows, const at::Tensor& matrix, int64_t height,
                       int64_t width, int64_t experts) {
  TORCH_CHECK(matrix.dim() >= 2 && matrix.size(-2) == height && matrix.size(-1) == width,
              "matrix must end with ", height, " x ", width, ", has ", matrix.sizes());
  int64_t matrices = 1;
  for (int64_t i = 0; i < matrix.dim() - 2; ++i) matrices *= matrix.size(i);
  TORCH_CHECK(matrices % experts == 0, "matrix must have ", experts, " for each modality, has ",
              matrices, " in all");
  const bool wide = matrix.scalar_type() == at::kFloat;
  TORCH_CHECK(matrix.device() == rows.device() && matrix.is_contiguous() &&
                  (wide || matrix.scalar_type() == rows.scalar_type()),
              "matrix must be contiguous, on ", rows.device(), " and float32 or ",
              rows.scalar_type(), ", is ", matrix.toString(), " on ", matrix.device());
  return matrices / experts;
}

// Checks the operands of a pass that returns du = right times the matrix beside the sums.
void check_du(const at::Tensor& left, const at::Tensor& right, const at::Tensor& matrix,
              int64_t num_groups) {
  TORCH_CHECK(right.scalar_type() != at::kFloat && left.scalar_type() == right.scalar_type() &&
                  left.size(1) <= cuda::kMaxRankWithDu,
              "with a matrix wgrad takes left and right of bfloat16 or float16, the same, and at "
              "most ",
              cuda::kMaxRankWithDu, " columns of left; they are ", left.toString(), " of ",
              left.sizes(), " and ", right.toString());
  check_float_or_like(right, matrix, "matrix", {num_groups, right.size(1), left.size(1)});
}

// A problem of wgrad.
struct Sums {
  const at::Tensor &left, &right, &tiles, &groups, &factors;
  std::optional<at::Tensor> weights, matrix;
  int64_t chunk;
  bool left_by_token, right_by_token;
};

// Checks a problem of wgrad; returns a bound on the blocks of each of its launches.
int64_t check_sums(const Sums& args, const at::Tensor& perm, int64_t top_k) {
  const at::Tensor &left = args.left, &right = args.right;
  check_half_or_float(right, "right");
  const int64_t rows = check_perm(right, perm, top_k), tokens = rows / top_k;
  check_like(right, right, "right", right.scalar_type(), {args.right_by_token ? tokens : rows, -1});
  check_float_or_like(right, left, "left", {args.left_by_token ? tokens : rows, -1});
  check_like(right, args.tiles, "tiles", at::kLong, {3, -1});
  check_like(right, args.groups, "groups", at::kLong, {3, -1});
  check_like(right, args.factors, "factors", at::kFloat, {-1});
  if (args.weights) check_float_or_like(right, *args.weights, "weights", {tokens, top_k});
  const int64_t num_groups = args.groups.size(1), height = left.size(1), width = right.size(1);
  TORCH_CHECK(num_groups < kMaxInt && height < kMaxInt && width < kMaxInt &&
                  args.tiles.size(1) < kMaxInt && args.chunk >= 1,
              "wgrad takes fewer than 2^31 groups, tiles and columns, and at least a row in a "
              "chunk; there are ", num_groups, " groups, ", args.tiles.size(1), " tiles, ", height,
              " columns of left and ", width, " of right, and ", args.chunk, " rows in a chunk");
  TORCH_CHECK(args.factors.numel() >= 1 && num_groups % args.factors.numel() == 0,
              "factors must be one for each of as many neighbouring groups, there are ",
              args.factors.numel(), " for ", num_groups);
  if (args.matrix) check_du(left, right, *args.matrix, num_groups);
  // Of the first: one for 16 x 128 of a tile's sums. Of the second: one for 1,024 elements of a
  // sum, or of a tile of du.
  const int64_t tiles = args.tiles.size(1), chunk = std::min(args.chunk, rows);
  const int64_t of_tiles = tiles * (height / 16 + 1) * (width / 128 + 1);
  const int64_t finishing = num_groups * (height * width / 1024 + 1) +
                            (args.matrix ? tiles * (chunk * height / 1024 + 1) : 0);
  TORCH_CHECK(std::max(of_tiles, finishing) < kMaxInt,
              "wgrad takes sums of fewer elements, there are ", num_groups, " of ", height, " x ",
              width);
  return std::max(of_tiles, finishing);
}

// Checks sums in slots; returns a bound on the blocks that add them.
int64_t check_folded(at::TensorList folded, const std::optional<at::Tensor>& segment_offsets,
                     int64_t num_rows, int64_t num_base, int64_t num_modalities) {
  TORCH_CHECK(segment_offsets && num_base >= 1 && num_modalities >= 1 &&
                  num_base < kMaxInt / num_modalities,
              "folded sums take segment_offsets, of at least one expert and one modality");
  check_like(folded[0], *segment_offsets, "segment_offsets", at::kLong, {-1});
  const int64_t pairs = num_base * num_modalities;
  TORCH_CHECK(segment_offsets->numel() > pairs + num_base, "segment_offsets must have more than ",
              pairs + num_base, " entries, has ", segment_offsets->numel());
  int64_t blocks = 0;
  for (const at::Tensor& slots : folded) {
    check_like(folded[0], slots, "folded", at::kFloat,
               {cuda::folded_slots(num_rows, pairs), -1, -1});
    blocks += pairs * (slots.size(1) * slots.size(2) / 1024 + 1);
  }
  return blocks;
}

int64_t size_of(const std::optional<at::Tensor>& tensor, int64_t dim) {
  return tensor ? tensor->size(dim) : 0;
}

// Checks the stacks (experts, height, width) of the frozen and of the added experts.
void check_stacks(const Experts& args, int64_t height, int64_t width) {
  const at::ScalarType dtype = args.left.scalar_type();
  check_like(args.left, args.stack, "stack", dtype, {-1, height, width});
  TORCH_CHECK(args.stack.size(0) >= 1, "stack must have an expert");
  check_vectors(args.stack, "stack");
  if (!args.extra) return;
  check_like(args.left, *args.extra, "extra", dtype, {-1, height, width});
  check_vectors(*args.extra, "extra");
}

bool in_parts(const std::optional<at::Tensor>& u) { return u && u->dim() == 3; }

// Checks matrices (num_modalities, experts, height, width) of the frozen experts, or of one that
// they share.
void check_adapters(const Experts& args, const at::Tensor& v, const char* name,
                    int64_t num_modalities, int64_t height, int64_t width) {
  check_float_or_like(args.left, v, name, {num_modalities, -1, height, width});
  TORCH_CHECK(v.size(1) == args.stack.size(0) || v.size(1) == 1, name, " must be of ",
              args.stack.size(0), " experts, or of 1 that all share, is of ", v.size(1));
}

int64_t modalities_of(const Experts& args) {
  const int64_t experts = args.stack.size(0) + size_of(args.extra, 0);
  return (args.segment_offsets.numel() - 1) / experts - 1;
}

// Checks the low-rank operands; v ends with (height, width), one of which is the rank.
void check_low_rank(const Experts& args, at::ScalarType u_dtype, int64_t num_modalities,
                    int64_t height, int64_t width) {
  TORCH_CHECK(args.u.has_value() == args.v.has_value() &&
                  args.u.has_value() == args.scaling.has_value(),
              "u, v and scaling must be given together or not at all");
  if (!args.u) return;
  if (in_parts(args.u)) {
    check_like(args.left, *args.u, "u", at::kFloat, {-1, args.perm.size(0), -1});
    TORCH_CHECK(args.u->size(0) >= 1, "u must have at least one part");
  } else {
    check_like(args.left, *args.u, "u", u_dtype, {args.perm.size(0), -1});
  }
  check_adapters(args, *args.v, "v", num_modalities, height, width);
  check_like(args.left, *args.scaling, "scaling", at::kFloat, {num_modalities});
}

// Checks left W, or left W^T if `transposed`, with size_n columns in the output; if `gated`, the
// stack has twice as many.
void check_experts(const Experts& args, bool by_token, bool transposed, bool gated,
                   int64_t size_n) {
  const int64_t rows = args.perm.numel(), size_k = args.left.size(-1);
  check_like(args.left, args.perm, "perm", at::kLong, {-1});
  check_like(args.left, args.left, "left", args.left.scalar_type(), {by_token ? -1 : rows, -1});
  check_vectors(args.left, "left");
  const int64_t tokens = args.left.size(0);
  TORCH_CHECK(rows < kMaxInt && (tokens == 0 ? rows == 0 : rows % tokens == 0),
              "perm must have as many entries for each row of left, and fewer than 2^31");
  TORCH_CHECK(cuda::grouped_gemm_supports(scalar_of(args.left), size_k, size_n),
              "the products of the experts are of bfloat16 or float16 and of sizes that are "
              "multiples of 8, with less than 2^30 elements; left is ",
              args.left.toString(), " of ", args.left.sizes(), ", for ", size_n, " columns");
  const int64_t of_stack = gated ? 2 * size_n : size_n;
  check_stacks(args, transposed ? of_stack : size_k, transposed ? size_k : of_stack);
  check_like(args.left, args.tiles, "tiles", at::kLong, {3, -1});
  TORCH_CHECK(args.block_m == 16 || args.block_m == 128 || args.block_m == 256,
              "block_m must be 16, 128 or 256, is ", args.block_m);
  const int64_t experts = args.stack.size(0) + size_of(args.extra, 0);
  check_like(args.left, args.segment_offsets, "segment_offsets", at::kLong, {-1});
  const int64_t segments = args.segment_offsets.numel() - 1;
  TORCH_CHECK(segments >= experts && segments % experts == 0 && segments < kMaxInt,
              "segment_offsets must have as many segments for each of ", experts,
              " experts, and one entry more, has ", segments + 1);
  TORCH_CHECK(!by_token || !in_parts(args.u), "u must have shape [", rows, ", -1], has ",
              args.u->sizes());
  const int64_t rank = size_of(args.u, -1);
  check_low_rank(args, transposed ? args.left.scalar_type() : at::kFloat, modalities_of(args),
                 transposed ? of_stack : rank, transposed ? rank : of_stack);
}

using OptionalTensor = std::optional<at::Tensor>;

// Added experts, of the dtype of the stack or float32, both projections alike.
void check_added(const at::Tensor& stack, const at::Tensor& extra, at::ScalarType dtype,
                 const char* name) {
  TORCH_CHECK(dtype == at::kFloat || dtype == stack.scalar_type(), name, " must be float32 or ",
              stack.scalar_type(), ", is ", dtype);
  check_like(stack, extra, name, dtype, {-1, stack.size(1), stack.size(2)});
  check_vectors(extra, name);
}

void check_stack_of(const at::Tensor& hidden_states, const at::Tensor& stack, const char* name,
                    std::initializer_list<int64_t> sizes) {
  check_like(hidden_states, stack, name, hidden_states.scalar_type(), sizes);
  check_vectors(stack, name);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> dispatch(
    const at::Tensor& topk_ids, int64_t num_experts, const std::optional<at::Tensor>& modality_ids,
    int64_t num_modalities) {
  check_like(topk_ids, topk_ids, "topk_ids", at::kLong, {-1, -1});
  if (modality_ids) {
    check_like(topk_ids, *modality_ids, "modality_ids", at::kLong, {topk_ids.size(0)});
  }
  TORCH_CHECK(topk_ids.size(1) >= 1 && topk_ids.numel() <= kMaxInt - (1 << 25),
              "topk_ids must have at least one expert of each token, and fewer than 2^31 entries");
  TORCH_CHECK(num_experts >= 1 && num_modalities >= 0 && num_experts < kMaxInt &&
                  num_modalities < kMaxInt && num_experts * (num_modalities + 1) < kMaxInt,
              "num_experts must be at least 1, num_modalities 0, and segments fewer than 2^31");
  const auto options = topk_ids.options();
  const at::Tensor perm = at::empty({topk_ids.numel()}, options);
  return {perm, at::empty_like(perm), at::empty({num_experts}, options),
          at::empty({num_experts + 1}, options),
          at::empty({num_experts * (num_modalities + 1) + 1}, options)};
}

std::vector<at::Tensor> tile_maps(const at::Tensor& segment_offsets, int64_t num_rows,
                                  at::IntArrayRef blocks, at::IntArrayRef groups) {
  check_like(segment_offsets, segment_offsets, "segment_offsets", at::kLong, {-1});
  const int64_t num_segments = segment_offsets.numel() - 1;
  TORCH_CHECK(num_segments >= 0 && num_segments < kMaxInt && num_rows >= 0 && num_rows < kMaxInt,
              "segment_offsets must have an entry, and there must be fewer than 2^31 rows");
  TORCH_CHECK(blocks.size() <= cuda::kMaxMaps && groups.size() == 5 * blocks.size(),
              "there must be at most ", cuda::kMaxMaps,
              " maps, and five numbers in groups for each");
  std::vector<at::Tensor> made;
  for (size_t map = 0; map < blocks.size(); ++map) {
    check_groups(groups, map, num_segments);
    TORCH_CHECK(blocks[map] >= 1 && blocks[map] < kMaxInt, "blocks must be at least 1");
    const int64_t num_groups = groups[5 * map];
    const int64_t num_tiles = cuda::most_tiles(num_rows, num_groups, blocks[map]);
    TORCH_CHECK(num_tiles < kMaxInt, "there must be fewer than 2^31 tiles");
    made.push_back(at::empty({3, num_tiles}, segment_offsets.options()));
    made.push_back(at::empty({3, num_groups}, segment_offsets.options()));
  }
  return made;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>>
dispatch_with_maps(const at::Tensor& topk_ids, int64_t num_experts,
                   const std::optional<at::Tensor>& modality_ids, int64_t num_modalities,
                   at::IntArrayRef blocks, at::IntArrayRef groups) {
  const auto fields = dispatch(topk_ids, num_experts, modality_ids, num_modalities);
  const at::Tensor& segment_offsets = std::get<4>(fields);
  // This limit is CUDA's, whose `dispatch` is this op without maps; the CPU's has a higher one.
  TORCH_CHECK(segment_offsets.numel() <= cuda::kMaxKeys, "dispatch on CUDA takes fewer than ",
              cuda::kMaxKeys, " pairs of an expert and a modality, there are ",
              segment_offsets.numel() - 1);
  return std::tuple_cat(
      fields, std::make_tuple(tile_maps(segment_offsets, topk_ids.numel(), blocks, groups)));
}

at::Tensor combine(const at::Tensor& rows, const at::Tensor& inv_perm, const at::Tensor& num_rows,
                   const std::optional<at::Tensor>& weights, int64_t num_tokens) {
  check_half_or_float(rows, "rows");
  check_like(rows, rows, "rows", rows.scalar_type(), {-1, -1});
  check_vectors(rows, "rows");
  check_like(rows, inv_perm, "inv_perm", at::kLong, {rows.size(0)});
  check_like(rows, num_rows, "num_rows", at::kLong, {1});
  TORCH_CHECK(num_tokens >= 0 && rows.size(1) < kMaxInt &&
                  (num_tokens == 0 ? rows.size(0) == 0 : rows.size(0) % num_tokens == 0),
              "rows must be as many for each of ", num_tokens, " tokens, there are ", rows.size(0));
  if (weights) {
    check_half_or_float(*weights, "weights");
    check_like(rows, *weights, "weights", weights->scalar_type(), {num_tokens, -1});
    TORCH_CHECK(weights->numel() == rows.size(0), "weights must have an entry for each row");
  }
  return at::empty({num_tokens, rows.size(1)}, rows.options());
}

void shrink(const at::Tensor& out, const at::Tensor& left, const at::Tensor& matrix,
            const at::Tensor& perm, const at::Tensor& tiles,
            const std::optional<at::Tensor>& segment_offsets, int64_t num_pairs, int64_t num_base,
            int64_t experts, int64_t top_k, bool by_token, bool rank_first) {
  check_half_or_float(left, "left");
  const int64_t rows = check_perm(left, perm, top_k);
  check_like(left, left, "left", left.scalar_type(), {by_token ? rows / top_k : rows, -1});
  check_float_or_like(left, out, "out", {rows, -1});
  check_like(left, tiles, "tiles", at::kLong, {3, -1});
  const int64_t size_k = left.size(1), rank = out.size(1);
  // The kernel's blocks are one for each tile, and one for 512 rows that get zeros.
  TORCH_CHECK(size_k < kMaxInt && rank < kMaxInt && tiles.size(1) + rows / 512 < kMaxInt,
              "left, out and tiles must have fewer than 2^31 columns");
  TORCH_CHECK(num_base >= 1 && num_base < kMaxInt && (experts == 1 || experts == num_base),
              "experts must be 1 or num_base = ", num_base, ", is ", experts);
  const int64_t modalities = check_matrices(left, matrix, rank_first ? rank : size_k,
                                            rank_first ? size_k : rank, experts);
  TORCH_CHECK(num_pairs == modalities * num_base, "tiles must be of the pairs of ", modalities,
              " modalities and ", num_base, " experts, are of ", num_pairs);
  if (!segment_offsets) return;
  check_like(left, *segment_offsets, "segment_offsets", at::kLong, {-1});
  TORCH_CHECK(segment_offsets->numel() > num_base * (modalities + 1),
              "segment_offsets must have ", modalities + 1, " segments for each of ", num_base,
              " experts, and one entry more, has ", segment_offsets->numel());
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
  const size_t num = left.size();
  for (const size_t size : {right.size(), tiles.size(), groups.size(), factors.size(),
                            weights.size(), chunks.size(), transposed.size(),
                            left_by_token.size(), right_by_token.size()}) {
    TORCH_CHECK(size == num, "every list must have an entry for each of ", num,
                " problems, one has ", size);
  }
  TORCH_CHECK(num <= cuda::kMaxProblems && folded.size() <= cuda::kMaxProblems &&
                  (num > 0 || !matrix) &&
                  (num + folded.size() > 0 ? perm.has_value() : dots.has_value()),
              "wgrad takes at most ", cuda::kMaxProblems,
              " problems, and as many folded sums, with perm, or dots alone; there are ", num,
              " problems and ", folded.size(), " folded sums");
  const at::Tensor& first = perm ? *perm : *dots;
  const int64_t tokens = perm ? check_perm(first, first, top_k) / top_k : -1;
  if (dots) check_like(first, *dots, "dots", at::kFloat, {-1, tokens, top_k});
  const auto options = first.options().dtype(at::kFloat);
  std::vector<at::Tensor> sums;
  int64_t blocks = dots ? dots->numel() / 1024 : 0;
  for (size_t i = 0; i < num; ++i) {
    TORCH_CHECK(right[i].scalar_type() == right[0].scalar_type(),
                "right must have one dtype in all problems, has ", right[0].toString(), " and ",
                right[i].toString());
    const Sums problem{left[i],    right[i],  tiles[i],         groups[i],
                       factors[i], weights[i], i == 0 ? matrix : std::nullopt,
                       chunks[i],  left_by_token[i], right_by_token[i]};
    blocks += check_sums(problem, first, top_k);
    const int64_t height = left[i].size(1), width = right[i].size(1);
    sums.push_back(transposed[i] ? at::empty({groups[i].size(1), width, height}, options)
                                 : at::empty({groups[i].size(1), height, width}, options));
  }
  if (!folded.empty()) {
    blocks += check_folded(folded, segment_offsets, first.numel(), num_base, num_modalities);
  }
  for (const at::Tensor& slots : folded) {
    sums.push_back(
        at::empty({num_modalities * num_base, slots.size(1), slots.size(2)}, options));
  }
  TORCH_CHECK(blocks < kMaxInt, "wgrad takes sums of fewer elements");
  const auto sum_of_dots =
      at::empty({dots ? dots->size(1) : 0, top_k}, options.dtype(dots_dtype));
  check_half_or_float(sum_of_dots, "the sum of dots");
  return {sums, at::empty({matrix ? tokens * top_k : 0, matrix ? left[0].size(1) : 0}, options),
          sum_of_dots};
}

void add_low_rank(const at::Tensor& out, const at::Tensor& u, const at::Tensor& v,
                  const at::Tensor& scaling, const at::Tensor& perm, const at::Tensor& tiles,
                  bool rank_last) {
  TORCH_CHECK(out.scalar_type() == at::kHalf || out.scalar_type() == at::kBFloat16,
              "out must be bfloat16 or float16, is ", out.scalar_type());
  check_like(out, out, "out", out.scalar_type(), {-1, -1});
  check_vectors(out, "out");
  const int64_t rows = out.size(0), width = out.size(1);
  check_like(out, perm, "perm", at::kLong, {rows});
  check_like(out, u, "u", rank_last ? out.scalar_type() : at::kFloat, {rows, -1});
  check_like(out, scaling, "scaling", at::kFloat, {-1});
  const int64_t rank = u.size(1), modalities = scaling.size(0);
  check_like(out, tiles, "tiles", at::kLong, {3, -1});
  TORCH_CHECK(width <= kMaxGrid * 128 && rank < kMaxInt && tiles.size(1) < kMaxInt,
              "out must have at most ", kMaxGrid * 128, " columns, u and tiles fewer than 2^31");
  check_float_or_like(out, v, "v",
                      {modalities, rank_last ? width : rank, rank_last ? rank : width});
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> gate_up(
    const at::Tensor& left, const at::Tensor& stack, const std::optional<at::Tensor>& extra,
    const at::Tensor& perm, const at::Tensor& tiles, const at::Tensor& segment_offsets,
    const std::optional<at::Tensor>& u, const std::optional<at::Tensor>& v,
    const std::optional<at::Tensor>& scaling, int64_t block_m, bool save,
    const std::optional<at::Tensor>& down_lora_A) {
  TORCH_CHECK(stack.dim() == 3 && stack.size(1) % 2 == 0,
              "stack must be (experts, 2 * inter, hidden), is ", stack.sizes());
  const int64_t inter = stack.size(1) / 2;
  const Experts args{left, stack, extra, perm, tiles, segment_offsets, u, v, scaling, block_m};
  check_experts(args, /*by_token=*/true, /*transposed=*/true, /*gated=*/true, inter);
  if (down_lora_A) {
    TORCH_CHECK(u && u->size(1) > 0, "down_lora_A is taken with u alone");
    check_adapters(args, *down_lora_A, "down_lora_A", modalities_of(args), -1, inter);
    check_vectors(*down_lora_A, "down_lora_A");
  }
  const int64_t rows = perm.numel(), parts = cuda::gate_up_parts(inter, block_m);
  return {at::empty({save ? rows : 0, 2 * inter}, left.options()),
          at::empty({rows, inter}, left.options()),
          at::empty({down_lora_A ? parts : 0, rows, size_of(down_lora_A, 2)},
                    left.options().dtype(at::kFloat))};
}

std::tuple<at::Tensor, at::Tensor> grouped_gemm(
    const at::Tensor& left, const at::Tensor& stack, const std::optional<at::Tensor>& extra,
    const at::Tensor& perm, const at::Tensor& tiles, const at::Tensor& segment_offsets,
    const std::optional<at::Tensor>& u, const std::optional<at::Tensor>& v,
    const std::optional<at::Tensor>& scaling, int64_t block_m, bool transposed, bool save) {
  TORCH_CHECK(stack.dim() == 3, "stack must have three dimensions, has ", stack.sizes());
  const int64_t size_n = stack.size(transposed ? 1 : 2);
  check_experts({left, stack, extra, perm, tiles, segment_offsets, u, v, scaling, block_m},
                /*by_token=*/false, transposed, /*gated=*/false, size_n);
  TORCH_CHECK(!save || in_parts(u), "save takes parts of u");
  const int64_t rows = perm.numel();
  return {at::empty({rows, size_n}, left.options()),
          at::empty({save ? rows : 0, size_of(u, -1)},
                    left.options().dtype(transposed ? left.scalar_type() : at::kFloat))};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>> act_backward(
    const at::Tensor& left, const at::Tensor& stack, const std::optional<at::Tensor>& extra,
    const at::Tensor& perm, const at::Tensor& tiles, const at::Tensor& segment_offsets,
    const std::optional<at::Tensor>& u, const std::optional<at::Tensor>& v,
    const std::optional<at::Tensor>& scaling, int64_t block_m, const at::Tensor& weights,
    const at::Tensor& pre_act, bool act_of_adapted, bool act_of_added,
    const std::optional<at::Tensor>& u1, const std::optional<at::Tensor>& gate_up_lora_B,
    const std::optional<at::Tensor>& gate_up_scaling, const c10::List<bool>& wanted) {
  TORCH_CHECK(stack.dim() == 3, "stack must have three dimensions, has ", stack.sizes());
  const int64_t inter = stack.size(2), rows = perm.numel();
  const Experts args{left, stack, extra, perm, tiles, segment_offsets, u, v, scaling, block_m};
  check_experts(args, /*by_token=*/true, /*transposed=*/false, /*gated=*/false, inter);
  check_float_or_like(left, weights, "weights", {left.size(0), -1});
  TORCH_CHECK(weights.numel() == rows, "weights must have an entry for each of ", rows, " rows");
  check_like(left, pre_act, "pre_act", left.scalar_type(), {rows, 2 * inter});
  check_vectors(pre_act, "pre_act");
  const int64_t parts = cuda::grouped_gemm_parts(inter, block_m);
  const auto dots = at::empty({parts, weights.size(0), weights.size(1)},
                              left.options().dtype(at::kFloat));
  const int64_t act_rows = act_of_adapted || act_of_added ? rows : 0;
  const int64_t rank = size_of(u1, 1);
  if (u1) {
    const int64_t modalities = modalities_of(args);
    TORCH_CHECK(block_m >= cuda::kFoldedRows && u && rank >= 1 && rank <= cuda::kMaxFoldedRank &&
                    u->size(1) <= cuda::kMaxFoldedRank && !act_of_adapted && wanted.size() == 3,
                "u1 is taken with u, both of rank 1 to ", cuda::kMaxFoldedRank, ", in tiles of ",
                cuda::kFoldedRows, " rows, and the activation of adapted rows is not written then");
    TORCH_CHECK(gate_up_lora_B && gate_up_scaling,
                "u1, gate_up_lora_B and gate_up_scaling must be given together or not at all");
    check_like(left, *u1, "u1", left.scalar_type(), {rows, -1});
    check_float_or_like(left, *gate_up_lora_B, "gate_up_lora_B",
                        {modalities, stack.size(0), 2 * inter, rank});
    check_like(left, *gate_up_scaling, "gate_up_scaling", at::kFloat, {modalities});
  }
  const auto folded = [&](int index, int64_t number, int64_t height, int64_t width) {
    return at::empty({u1 && wanted[index] ? number : 0, height, width}, dots.options());
  };
  const int64_t slots = cuda::folded_slots(rows, u1 ? modalities_of(args) * stack.size(0) : 0);
  return {at::empty_like(pre_act),
          at::empty({act_rows, inter}, left.options()),
          dots,
          {folded(0, parts, rows, rank), folded(1, slots, 2 * inter, rank),
           folded(2, slots, size_of(u, 1), inter)}};
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
    bool gated, double, double, double, bool interleaved) {
  TORCH_CHECK(act == "silu" && gated && !interleaved && !gate_up_bias && !gate_up_scales &&
                  !down_scales,
              "moe_mlp_inference on CUDA computes SwiGLU of rows [gate; up], without a bias and "
              "from stacks that are not packed");
  TORCH_CHECK(scalar_of(hidden_states) != cuda::Scalar::kFloat,
              "hidden_states must be bfloat16 or float16, is ", hidden_states.scalar_type());
  check_routed(hidden_states, topk_ids, topk_weights, gate_up_proj, down_proj, extra_gate_up_proj,
               extra_down_proj);
  const at::ScalarType dtype = hidden_states.scalar_type();
  check_like(hidden_states, hidden_states, "hidden_states", dtype, {-1, -1});
  check_vectors(hidden_states, "hidden_states");
  check_like(hidden_states, topk_ids, "topk_ids", at::kLong, {-1, -1});
  const int64_t tokens = topk_ids.size(0), top_k = topk_ids.size(1), H = hidden_states.size(1);
  check_float_or_like(hidden_states, topk_weights, "topk_weights", {tokens, top_k});
  if (modality_ids) check_like(hidden_states, *modality_ids, "modality_ids", at::kLong, {tokens});
  TORCH_CHECK(gate_up_proj.size(0) >= 1 && gate_up_proj.size(1) % 2 == 0,
              "gate_up_proj must be (experts, 2 * inter, hidden), is ", gate_up_proj.sizes());
  const int64_t E = gate_up_proj.size(0), inter = gate_up_proj.size(1) / 2;
  const int64_t rank = std::max(size_of(gate_up_lora_A, 2), size_of(down_lora_A, 2));
  TORCH_CHECK(cuda::decode_takes(tokens, top_k, H, inter, rank), "moe_mlp_inference on CUDA takes ",
              "at most ", cuda::kMaxDecodeTokens, " tokens with ", cuda::kMaxDecodeRows,
              " experts in all, ranks of at most ", cuda::kMaxDecodeRank,
              " and sizes that are multiples of 8, less than 2^24; there are ", tokens, " with ",
              top_k, " each, rank ", rank, ", hidden size ", H, " and intermediate size ", inter);
  check_stack_of(hidden_states, gate_up_proj, "gate_up_proj", {E, 2 * inter, H});
  check_stack_of(hidden_states, down_proj, "down_proj", {E, H, inter});
  if (extra_gate_up_proj) {
    const at::ScalarType wide = extra_gate_up_proj->scalar_type();
    check_added(gate_up_proj, *extra_gate_up_proj, wide, "extra_gate_up_proj");
    check_added(down_proj, *extra_down_proj, wide, "extra_down_proj");
  }
  TORCH_CHECK(E + size_of(extra_gate_up_proj, 0) < kMaxInt,
              "there must be fewer than 2^31 experts");
  const int64_t of_up = check_pair(hidden_states, dtype, {E, 2 * inter, H}, gate_up_lora_A,
                                   gate_up_lora_B, gate_up_scaling, "gate_up");
  const int64_t of_down = check_pair(hidden_states, dtype, {E, H, inter}, down_lora_A, down_lora_B,
                                     down_scaling, "down");
  TORCH_CHECK(of_up == 0 || of_down == 0 || of_up == of_down,
              "both pairs of adapters must have the same number of modalities, have ", of_up,
              " and ", of_down);
  TORCH_CHECK(std::max(of_up, of_down) < kMaxInt, "there must be fewer than 2^31 modalities");
  if (gate_up_lora_A) check_vectors(*gate_up_lora_A, "gate_up_lora_A");
  return at::empty_like(hidden_states);
}

}  // namespace moe_kernels::outputs
