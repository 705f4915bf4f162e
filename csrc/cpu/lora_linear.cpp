// Adapters of a linear layer. The caller has computed the layer's output; only rows with a modality
// are changed.
#include <ATen/Dispatch.h>

#include "../ops.h"
#include "lora.h"

namespace moe_kernels::cpu {
namespace {

constexpr int64_t kRowsPerUpdate = 192;

struct LoraLinearInputs {
  const at::Tensor& hidden_states;  // (T, in)
  const at::Tensor& perm;           // (T,)
  const at::Tensor& segment_offsets;
  const at::Tensor& lora_A;   // (M, r, in)
  const at::Tensor& lora_B;   // (M, out, r)
  const at::Tensor& scaling;  // (M,)

  int64_t num_modalities() const { return lora_A.size(0); }
  int64_t tokens() const { return hidden_states.size(0); }
  int64_t rank() const { return lora_A.size(1); }
  int64_t in() const { return lora_A.size(2); }
  int64_t out() const { return lora_B.size(1); }

  void check() const {
    check_compute_dtype(hidden_states, "hidden_states");
    const at::ScalarType dtype = hidden_states.scalar_type();
    check_tensor(hidden_states, "hidden_states", dtype, {-1, -1});
    check_float_or(dtype, hidden_states, lora_A, "lora_A", {-1, -1, hidden_states.size(1)});
    TORCH_CHECK(rank() >= 1 && in() >= 1, "lora_A must have a rank and a width of at least 1");
    check_float_or(dtype, hidden_states, lora_B, "lora_B", {num_modalities(), -1, rank()});
    TORCH_CHECK(out() >= 1, "lora_B must have a width of at least 1");
    check_tensor(scaling, "scaling", at::kFloat, {num_modalities()});
    check_tensor(perm, "perm", at::kLong, {tokens()});
    check_permutation(perm, "perm");
    check_tensor(segment_offsets, "segment_offsets", at::kLong, {num_modalities() + 2});
    check_offsets(segment_offsets, "segment_offsets", tokens());
  }
};

template <typename scalar_t>
class LoraLinear {
 public:
  using acc_t = acc_type<scalar_t>;

  explicit LoraLinear(const LoraLinearInputs& in)
      : in_(in),
        segments_{in.segment_offsets.const_data_ptr<int64_t>(), 1, in.num_modalities()},
        perm_(in.perm.const_data_ptr<int64_t>()),
        hidden_(in.hidden_states.const_data_ptr<scalar_t>()),
        lora_{in.rank(),
              in.in(),
              in.out(),
              1,
              {in.lora_A.const_data_ptr(), 1, in.rank(), in.in(), is_wide<scalar_t>(in.lora_A),
               false},
              {in.lora_B.const_data_ptr(), 1, in.out(), in.rank(), is_wide<scalar_t>(in.lora_B),
               false},
              in.scaling.const_data_ptr<float>()},
        blocks_(adapted_blocks(segments_, 1, kRowsPerUpdate)) {}

  at::Tensor forward(scalar_t* out, bool save) {
    const auto& kernel = kernels<scalar_t>();
    const int64_t r = lora_.rank;
    at::Tensor u = allocate({save ? in_.tokens() : 0, r});
    for_each_unadapted(segments_, 1, in_.tokens(),
                       [&](int64_t begin, int64_t end) { zero_rows(u, begin, end); });
    const at::Tensor scaled = allocate({in_.tokens(), r});
    scalar_t* scaled_u = scaled.mutable_data_ptr<scalar_t>();
    scalar_t* saved_u = save ? u.mutable_data_ptr<scalar_t>() : scaled_u;
    shrink_rows<scalar_t>(
        blocks_, lora_.in, r, [&](int64_t p) { return hidden_ + perm_[p] * lora_.in; }, lora_.A.t(),
        [&](int64_t p, const RowBlock& block, acc_t* values) {
          kernel.store(values, acc_t(1), saved_u + p * r, r);
          kernel.load(saved_u + p * r, acc_t(1), values, r);
          kernel.store(values, lora_.scale(block.modality), scaled_u + p * r, r);
        });
    add_low_rank(scaled_u, lora_.B.t(), lora_.out, out);
    return u;
  }

  std::vector<at::Tensor> backward(const scalar_t* grad_out, const scalar_t* u,
                                   scalar_t* grad_hidden, const c10::List<bool>& needs) {
    at::Tensor du, scaled;
    if (needs[0] || grad_hidden) shrink_grad_out(grad_out, du, scaled);
    if (grad_hidden) {
      add_low_rank(scaled.const_data_ptr<scalar_t>(), lora_.A, lora_.in, grad_hidden);
    }
    std::vector<at::Tensor> grads;
    if (needs[0]) grads.push_back(A_gradient(du.template const_data_ptr<acc_t>()));
    if (needs[1]) grads.push_back(B_gradient(grad_out, u));
    return grads;
  }

 private:
  static at::Tensor allocate(at::IntArrayRef sizes) {
    return empty(sizes, c10::CppTypeToScalarType<scalar_t>::value);
  }
  static at::Tensor allocate_acc(at::IntArrayRef sizes) {
    return empty(sizes, c10::CppTypeToScalarType<acc_t>::value);
  }

  // rows[perm[p]] += u[p] @ stack, for adapted rows.
  void add_low_rank(const scalar_t* u, const AdapterStack<scalar_t>& stack, int64_t width,
                    scalar_t* rows) const {
    const auto& kernel = kernels<scalar_t>();
    const int64_t r = lora_.rank, panel_bytes = ItemPanels<scalar_t>::panel_bytes(r);
    const ColumnPlan plan = column_plan<scalar_t>(width, r);
    const int64_t items = plan.num_items(), ldc = plan.item_width();
    const int64_t bytes = Scratch::bytes<char>(plan.panels * panel_bytes) +
                          Scratch::bytes<scalar_t>(plan.width * r) +
                          Tile<scalar_t>::bytes(r, ldc);
    const int64_t total = static_cast<int64_t>(blocks_.size()) * items;
    for_each_item(total, bytes, [&](int64_t index, char* memory) {
      const RowBlock& block = blocks_[index / items];
      const ItemColumns columns = plan.item(index % items);
      Scratch scratch(memory);
      char* packed = scratch.take<char>(plan.panels * panel_bytes);
      scalar_t* narrowed = scratch.take<scalar_t>(plan.width * r);
      Tile<scalar_t> tile(scratch, r, ldc);
      const AdapterMatrix<scalar_t> matrix = stack.at(0, block.modality);
      for (int64_t j = 0; j < columns.num_panels; ++j) {
        matrix.pack(columns.begin[j], columns.size[j], r, 2, packed + j * panel_bytes, narrowed);
      }
      for_each_tile(block.rows, kernel.max_rows, [&](int64_t p, int m) {
        for_each_piece(tile, p, m, columns, plan.width, [&](int64_t t, int64_t column, int64_t n,
                                                            acc_t* c) {
          kernel.load(rows + t * width + column, acc_t(1), c, n);
        });
        tile.multiply(0, m, r, [&](int i) { return u + (p + i) * r; }, packed, columns.num_panels,
                      2, true);
        for_each_piece(tile, p, m, columns, plan.width, [&](int64_t t, int64_t column, int64_t n,
                                                            acc_t* c) {
          kernel.store(c, acc_t(1), rows + t * width + column, n);
        });
      });
    });
  }

  // f(token, column, n, c) for every row and panel of a tile.
  template <typename F>
  void for_each_piece(const Tile<scalar_t>& tile, int64_t p, int m, const ItemColumns& columns,
                      int64_t width, const F& f) const {
    for (int i = 0; i < m; ++i) {
      for (int64_t j = 0; j < columns.num_panels; ++j) {
        f(perm_[p + i], columns.begin[j], columns.size[j], tile.c + i * tile.ldc + j * width);
      }
    }
  }

  // du = dY B, and scale * du rounded.
  void shrink_grad_out(const scalar_t* grad_out, at::Tensor& du, at::Tensor& scaled) const {
    const auto& kernel = kernels<scalar_t>();
    const int64_t r = lora_.rank;
    du = allocate_acc({in_.tokens(), r});
    scaled = allocate({in_.tokens(), r});
    acc_t* exact = du.mutable_data_ptr<acc_t>();
    scalar_t* rounded = scaled.mutable_data_ptr<scalar_t>();
    shrink_rows<scalar_t>(
        blocks_, lora_.out, r, [&](int64_t p) { return grad_out + perm_[p] * lora_.out; }, lora_.B,
        [&](int64_t p, const RowBlock& block, acc_t* values) {
          std::copy(values, values + r, exact + p * r);
          kernel.store(values, lora_.scale(block.modality), rounded + p * r, r);
        });
  }

  // dA = sum of (s du)^T x
  at::Tensor A_gradient(const acc_t* du) const {
    at::Tensor grad = allocate_acc(in_.lora_A.sizes());
    wgrad<scalar_t>(
        adapter_groups(segments_, 1, false), lora_.rank, lora_.in,
        [&](const OuterItem& item, int64_t p, acc_t* dst) {
          kernels<acc_t>().load(du + p * lora_.rank + item.row, lora_.scale(item.group + 1), dst,
                                item.num_rows);
        },
        [&](int64_t p) { return hidden_ + perm_[p] * lora_.in; },
        write_gradient(grad.mutable_data_ptr<acc_t>(), lora_.rank, lora_.in, false));
    return grad;
  }

  // dB = sum of dY^T (s u)
  at::Tensor B_gradient(const scalar_t* grad_out, const scalar_t* u) const {
    at::Tensor grad = allocate_acc(in_.lora_B.sizes());
    wgrad<scalar_t>(
        adapter_groups(segments_, 1, false), lora_.rank, lora_.out,
        [&](const OuterItem& item, int64_t p, acc_t* dst) {
          kernels<scalar_t>().load(u + p * lora_.rank + item.row, lora_.scale(item.group + 1), dst,
                                   item.num_rows);
        },
        [&](int64_t p) { return grad_out + perm_[p] * lora_.out; },
        write_gradient(grad.mutable_data_ptr<acc_t>(), lora_.rank, lora_.out, true));
    return grad;
  }

  const LoraLinearInputs& in_;
  Segments segments_;
  const int64_t* perm_;
  const scalar_t* hidden_;
  Lora<scalar_t> lora_;
  std::vector<RowBlock> blocks_;
};

}  // namespace

at::Tensor lora_linear_forward(at::Tensor& out, const at::Tensor& hidden_states,
                               const at::Tensor& perm, const at::Tensor& segment_offsets,
                               const at::Tensor& lora_A, const at::Tensor& lora_B,
                               const at::Tensor& scaling, bool save_for_backward) {
  const LoraLinearInputs inputs{hidden_states, perm, segment_offsets, lora_A, lora_B, scaling};
  inputs.check();
  check_tensor(out, "out", hidden_states.scalar_type(), {inputs.tokens(), inputs.out()});
  return AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kBFloat16, at::kHalf, hidden_states.scalar_type(), "lora_linear_forward", [&] {
        return LoraLinear<scalar_t>(inputs).forward(out.mutable_data_ptr<scalar_t>(),
                                                    save_for_backward);
      });
}

std::vector<at::Tensor> lora_linear_backward(
    const at::Tensor& grad_out, const at::Tensor& hidden_states, const at::Tensor& u,
    const at::Tensor& perm, const at::Tensor& segment_offsets, const at::Tensor& lora_A,
    const at::Tensor& lora_B, const at::Tensor& scaling,
    const std::optional<at::Tensor>& grad_hidden, const c10::List<bool>& needs) {
  const LoraLinearInputs inputs{hidden_states, perm, segment_offsets, lora_A, lora_B, scaling};
  inputs.check();
  const at::ScalarType dtype = hidden_states.scalar_type();
  TORCH_CHECK(needs.size() == 2, "needs must have 2 entries, has ", needs.size());
  check_tensor(grad_out, "grad_out", dtype, {inputs.tokens(), inputs.out()});
  if (needs[1]) check_tensor(u, "u", dtype, {inputs.tokens(), inputs.rank()});
  if (grad_hidden) {
    check_tensor(*grad_hidden, "grad_hidden", dtype, {inputs.tokens(), inputs.in()});
  }
  return AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kBFloat16, at::kHalf, dtype, "lora_linear_backward", [&] {
        return LoraLinear<scalar_t>(inputs).backward(
            grad_out.const_data_ptr<scalar_t>(), u.const_data_ptr<scalar_t>(),
            grad_hidden ? grad_hidden->mutable_data_ptr<scalar_t>() : nullptr, needs);
      });
}

}  // namespace moe_kernels::cpu
