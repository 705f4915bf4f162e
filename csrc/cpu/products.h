// The three kinds of matrix product that the ops consist of, over rows in sorted order:
// shrink_rows (skinny, adapted rows only), expert_products (base weight plus its low-rank
// extension in one accumulator) and wgrad (parameter gradients).
#pragma once

#include <algorithm>
#include <vector>

#include "gemm.h"
#include "packed.h"
#include "parallel.h"
#include "segments.h"

namespace moe_kernels::cpu {

// Rows of one expert per work item: enough to make packing the weight cheap relative to the
// product.
constexpr int64_t kRowsPerItem = 768;
// Fewest rows per item of a skinny product, whose weight is small.
constexpr int64_t kRowsPerProjection = 192;
// Rows summed between two visits to an item's accumulator, its height, and panels beside it; an
// item of small height has as many times the panels as leave its accumulator in this size.
constexpr int64_t kRowsPerChunk = 256;
constexpr int64_t kOuterHeight = 96;
constexpr int64_t kOuterPanels = 8;
// Panels of a base product side by side in one work item: as many as leave half of a usual
// second-level cache of 1 MiB to the rest, but always an even number.
constexpr int64_t kMinPanels = 2, kMaxPanels = 8, kPackedBytes = 512 * 1024;

// Operand B of a product: W itself (K, N), or the transpose of W (N, K).
template <typename scalar_t>
struct Matrix {
  const scalar_t* data;
  int64_t ld;
  bool transposed;

  // Returns the matrix without its first k rows.
  Matrix rows_from(int64_t k) const { return {data + (transposed ? k : k * ld), ld, transposed}; }

  void pack(int64_t column, int64_t n, int64_t K, int nv, void* panel) const {
    if (transposed) {
      kernels<scalar_t>().pack_transposed(data + column * ld, ld, n, K, nv, panel);
    } else {
      kernels<scalar_t>().pack(data + column, ld, n, K, nv, panel);
    }
  }
};

// Depth of a piece of a packed weight's transpose that is unpacked at once: with the columns of a
// panel it leaves most of a second-level cache to the rest. Even, for the pairs of bf16.
constexpr int64_t kUnpackDepth = 512;

// An expert's weight as operand B, which may be packed.
template <typename scalar_t>
struct ExpertMatrix {
  Matrix<scalar_t> plain;  // of a packed weight `transposed` alone is meant
  const PackedStack* packed = nullptr;
  int64_t expert = 0;

  // Rows of B to pack for all panels before the next ones.
  int64_t step(int64_t K) const {
    if (!plain.transposed) return kPackRows;
    return packed ? kUnpackDepth : K;
  }

  // Returns columns [column, column + n) of rows [k, k + depth); scratch: n * depth elements, where
  // it is packed.
  Matrix<scalar_t> part(int64_t column, int64_t n, int64_t k, int64_t depth,
                        scalar_t* scratch) const {
    const bool transposed = plain.transposed;
    if (!packed) {
      const Matrix<scalar_t> rows = plain.rows_from(k);
      return {rows.data + column * (transposed ? plain.ld : 1), plain.ld, transposed};
    }
    if (transposed) {
      packed->unpack(expert, column, n, k, depth, scratch);
      return {scratch, depth, true};
    }
    packed->unpack(expert, k, depth, column, n, scratch);
    return {scratch, n, false};
  }
};

// An adapter's matrix. It may be stored in acc_t; then packing rounds it.
template <typename scalar_t>
struct AdapterMatrix {
  const void* data;
  int64_t ld;
  bool transposed;
  bool wide;

  // Returns columns [column, column + n) of K values in scalar_t; scratch: n * K elements.
  Matrix<scalar_t> narrow(int64_t column, int64_t n, int64_t K, scalar_t* scratch) const {
    using acc_t = acc_type<scalar_t>;
    const int64_t offset = column * (transposed ? ld : 1);
    if (!wide) return {static_cast<const scalar_t*>(data) + offset, ld, transposed};
    const int64_t rows = transposed ? n : K, columns = transposed ? K : n;
    const auto* from = static_cast<const acc_t*>(data) + offset;
    const auto& kernel = kernels<scalar_t>();
    if (columns == ld) {
      kernel.store(from, acc_t(1), scratch, rows * columns);
    } else {
      for (int64_t i = 0; i < rows; ++i) {
        kernel.store(from + i * ld, acc_t(1), scratch + i * columns, columns);
      }
    }
    return {scratch, columns, transposed};
  }

  void pack(int64_t column, int64_t n, int64_t K, int nv, void* panel, scalar_t* scratch) const {
    narrow(column, n, K, scratch).pack(0, n, K, nv, panel);
  }
};

// One (rows, columns) matrix per modality and expert, or per modality alone (shared).
template <typename scalar_t>
struct AdapterStack {
  const void* data = nullptr;  // of scalar_t, or of acc_t when wide
  int64_t num_experts = 0;     // 1 when shared by all
  int64_t rows = 0;
  int64_t columns = 0;
  bool wide = false;
  bool transposed = false;

  AdapterMatrix<scalar_t> at(int64_t expert, int64_t modality) const {
    const int64_t index = (modality - 1) * num_experts + (num_experts == 1 ? 0 : expert);
    const auto bytes = static_cast<int64_t>(wide ? sizeof(acc_type<scalar_t>) : sizeof(scalar_t));
    return {static_cast<const char*>(data) + index * rows * columns * bytes, columns, transposed,
            wide};
  }
  AdapterStack t() const {
    AdapterStack other = *this;
    other.transposed = !transposed;
    return other;
  }
};

// The columns of one work item: panel i holds columns [begin[i], begin[i] + size[i]) of the product.
struct ItemColumns {
  int64_t begin[kMaxPanels];
  int64_t size[kMaxPanels];
  int64_t num_panels = 0;

  void append(int64_t from, int64_t count) {
    begin[num_panels] = from;
    size[num_panels++] = count;
  }
};

// Division of a product's columns: adjacent panels, or adjacent panels of the first half followed
// by the same panels of the second half (gate and up).
struct ColumnPlan {
  int64_t num_columns;
  bool paired_halves;
  int64_t width;   // columns of a panel
  int64_t panels;  // panels of an item

  int64_t parts() const { return paired_halves ? 2 : 1; }
  int64_t item_width() const { return panels * width; }
  int64_t step() const { return item_width() / parts(); }
  int64_t num_items() const { return (num_columns / parts() + step() - 1) / step(); }
  ItemColumns item(int64_t j) const {
    const int64_t limit = num_columns / parts();
    ItemColumns columns;
    for (int64_t part = 0; part < parts(); ++part) {
      for (int64_t i = 0; i < panels / parts(); ++i) {
        const int64_t begin = j * step() + i * width;
        if (begin < limit) columns.append(part * limit + begin, std::min(width, limit - begin));
      }
    }
    return columns;
  }
};

template <typename scalar_t>
ColumnPlan column_plan(int64_t num_columns, int64_t K, bool paired_halves = false) {
  const auto& kernel = kernels<scalar_t>();
  const int64_t fitting = kPackedBytes / kernel.panel_bytes(K, 2) / 2 * 2;
  return {num_columns, paired_halves, 2 * kernel.vector,
          std::clamp(fitting, kMinPanels, kMaxPanels)};
}

struct PanelShape {
  int nv;         // vectors per panel
  int64_t width;  // columns per panel
  int64_t count;
};

template <typename scalar_t>
PanelShape panel_shape(int64_t num_columns) {
  const int64_t vector = kernels<scalar_t>().vector;
  const int nv = num_columns <= vector ? 1 : 2;
  const int64_t width = nv * vector;
  return {nv, width, (num_columns + width - 1) / width};
}

// Calls f(p, m) for the register tiles of the rows, as even as the kernels' limit allows.
template <typename F>
void for_each_tile(RowRange rows, int64_t max_rows, const F& f) {
  const int64_t tiles = (rows.size() + max_rows - 1) / max_rows;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t begin = rows.begin + rows.size() * i / tiles;
    const int64_t end = rows.begin + rows.size() * (i + 1) / tiles;
    f(begin, static_cast<int>(end - begin));
  }
}

// The register tile of one thread: row pointers, accumulators and room for widened rows.
template <typename scalar_t>
struct Tile {
  using acc_t = acc_type<scalar_t>;

  Tile(Scratch& scratch, int64_t K, int64_t ldc)
      : rows(scratch.take<const scalar_t*>(kernels<scalar_t>().max_rows)),
        wide(scratch.take<acc_t>(kernels<scalar_t>().max_rows * scratch_stride(K))),
        c(scratch.take<acc_t>(kernels<scalar_t>().max_rows * ldc)),
        ldc(ldc) {}

  static int64_t bytes(int64_t K, int64_t ldc) {
    const int64_t rows = kernels<scalar_t>().max_rows;
    return Scratch::bytes<const scalar_t*>(rows) + Scratch::bytes<acc_t>(rows * scratch_stride(K)) +
           Scratch::bytes<acc_t>(rows * ldc);
  }

  // Rows [first, first + m) of the tile = or += row(0..m) @ panels.
  template <typename Row>
  void multiply(int64_t first, int m, int64_t K, const Row& row, const void* panels,
                int64_t num_panels, int nv, bool accumulate) {
    for (int i = 0; i < m; ++i) rows[i] = row(i);
    kernels<scalar_t>().tile(m, K, rows, panels, static_cast<int>(num_panels), nv,
                             c + first * ldc, ldc, accumulate, wide);
  }

  // Rows [0, m) = row(0..m) @ W^T, panel by panel, from the unpacked weight.
  template <typename Row>
  void multiply_direct(int m, int64_t K, const Row& row, const Matrix<scalar_t>& weight,
                       const ItemColumns& columns, int64_t width) {
    for (int i = 0; i < m; ++i) rows[i] = row(i);
    const auto panel = [&](int64_t i) { return weight.data + columns.begin[i] * weight.ld; };
    for (int64_t i = 0; i < columns.num_panels; ++i) {
      const scalar_t* next = i + 1 < columns.num_panels ? panel(i + 1) : nullptr;
      kernels<scalar_t>().tile_direct(m, K, rows, panel(i), weight.ld, columns.size[i], next,
                                      c + i * width, ldc);
    }
  }

  const scalar_t** rows;
  acc_t* wide;
  acc_t* c;
  int64_t ldc;
};

// Rows per item of a skinny product over `rows` rows: many, so that its weight is packed less often,
// but not so many that threads would be idle. No row's result depends on it.
inline int64_t rows_per_projection(int64_t rows) {
  return std::clamp(rows / (4 * at::get_num_threads()), kRowsPerProjection, kRowsPerItem);
}

// Calls store(p, block, values) with row(p) (K,) @ stack.at(expert, modality) (K, N), for all rows
// of the blocks.
template <typename scalar_t, typename Row, typename Store>
void shrink_rows(const std::vector<RowBlock>& blocks, int64_t K, int64_t N, const Row& row,
                 const AdapterStack<scalar_t>& stack, const Store& store) {
  const auto& kernel = kernels<scalar_t>();
  const PanelShape panels = panel_shape<scalar_t>(N);
  const int64_t panel_bytes = kernel.panel_bytes(K, panels.nv);
  const int64_t ldc = panels.count * panels.width;
  const int64_t bytes = Scratch::bytes<char>(panels.count * panel_bytes) +
                        Scratch::bytes<scalar_t>(panels.width * K) +
                        Tile<scalar_t>::bytes(K, ldc);
  for_each_item(static_cast<int64_t>(blocks.size()), bytes, [&](int64_t item, char* memory) {
    const RowBlock& block = blocks[item];
    Scratch scratch(memory);
    char* packed = scratch.take<char>(panels.count * panel_bytes);
    scalar_t* narrowed = scratch.take<scalar_t>(panels.width * K);
    Tile<scalar_t> tile(scratch, K, ldc);
    const AdapterMatrix<scalar_t> matrix = stack.at(block.expert, block.modality);
    for (int64_t j = 0; j < panels.count; ++j) {
      const int64_t column = j * panels.width;
      matrix.pack(column, std::min(panels.width, N - column), K, panels.nv,
                  packed + j * panel_bytes, narrowed);
    }
    for_each_tile(block.rows, kernel.max_rows, [&](int64_t p, int m) {
      tile.multiply(0, m, K, [&](int i) { return row(p + i); }, packed, panels.count, panels.nv,
                    false);
      for (int i = 0; i < m; ++i) store(p + i, block, tile.c + i * ldc);
    });
  });
}

// Does the same for few rows, where packing would cost more than the products; the stack must be
// transposed.
template <typename scalar_t, typename Row, typename Store>
void shrink_few_rows(const std::vector<RowBlock>& blocks, int64_t K, int64_t N, const Row& row,
                     const AdapterStack<scalar_t>& stack, const Store& store) {
  const int64_t ldc = (N + 3) / 4 * 4;  // tile_direct writes whole groups of four columns
  const int64_t bytes = Scratch::bytes<scalar_t>(N * K) + Tile<scalar_t>::bytes(K, ldc);
  for_each_item(static_cast<int64_t>(blocks.size()), bytes, [&](int64_t item, char* memory) {
    const RowBlock& block = blocks[item];
    Scratch scratch(memory);
    scalar_t* narrowed = scratch.take<scalar_t>(N * K);
    Tile<scalar_t> tile(scratch, K, ldc);
    const Matrix<scalar_t> matrix =
        stack.at(block.expert, block.modality).narrow(0, N, K, narrowed);
    ItemColumns columns;
    columns.append(0, N);
    for_each_tile(block.rows, kernels<scalar_t>().max_rows, [&](int64_t p, int m) {
      tile.multiply_direct(m, K, [&](int i) { return row(p + i); }, matrix, columns, ldc);
      for (int i = 0; i < m; ++i) store(p + i, block, tile.c + i * ldc);
    });
  });
}

// Returns a plan with narrower items where `blocks` of rows times its items would leave threads
// idle.
inline ColumnPlan occupying_threads(ColumnPlan plan, int64_t blocks) {
  while (plan.panels > kMinPanels && blocks * plan.num_items() < 4 * at::get_num_threads()) {
    plan.panels -= 2;
  }
  return plan;
}

// Further steps of the same K loop for adapted rows: u (rows, r), already scaled, against the
// stack's (r, N). rank 0: there is none.
template <typename scalar_t>
struct Extension {
  int64_t rank = 0;
  const scalar_t* u = nullptr;
  AdapterStack<scalar_t> stack;
  int64_t num_experts = 0;  // experts beyond these carry no adapter
};

// Rows of all experts times their weights: row(p) (K,) @ base(expert) (K, N) + extension.
template <typename scalar_t>
struct ExpertProduct {
  const Segments& segments;
  int64_t K;
  ColumnPlan plan;
  Extension<scalar_t> extension;
  bool direct = false;  // do not pack the weights into panels; they must be transposed
  bool packed = false;  // they are stored packed

  int64_t max_depth() const { return std::max(K, extension.rank); }
};

// The operands of one work item.
template <typename scalar_t>
class ItemPanels {
 public:
  ItemPanels(Scratch& scratch, const ExpertProduct<scalar_t>& product)
      : product_(product),
        panels_(product.plan.panels),
        base_(scratch.take<char>(base_bytes(product))),
        unpacked_(scratch.take<scalar_t>(unpacked_elements(product))),
        low_rank_(scratch.take<char>(product.segments.num_modalities * panels_ *
                                     panel_bytes(product.extension.rank))),
        narrowed_(scratch.take<scalar_t>(product.plan.width * product.extension.rank)) {}

  static int64_t bytes(const ExpertProduct<scalar_t>& product) {
    const int64_t panels = product.plan.panels, rank = product.extension.rank;
    return Scratch::bytes<char>(base_bytes(product)) +
           Scratch::bytes<scalar_t>(unpacked_elements(product)) +
           Scratch::bytes<char>(product.segments.num_modalities * panels * panel_bytes(rank)) +
           Scratch::bytes<scalar_t>(product.plan.width * rank);
  }
  static int64_t panel_bytes(int64_t K) { return kernels<scalar_t>().panel_bytes(K, 2); }

  // For rows of one expert.
  void pack(const ExpertMatrix<scalar_t>& base, int64_t expert, RowRange rows,
            const ItemColumns& columns) {
    columns_ = columns;
    weight_ = base.plain;
    if (!product_.direct) {
      pack_base(base);
    } else if (base.packed) {
      unpack_base(base);
    }
    if (!extended(expert)) return;
    const int64_t rank = product_.extension.rank;
    for (int64_t m = 1; m <= product_.segments.num_modalities; ++m) {
      if (overlap(product_.segments.modality(expert, m), rows).size() <= 0) continue;
      const AdapterMatrix<scalar_t> matrix = product_.extension.stack.at(expert, m);
      for (int64_t i = 0; i < columns.num_panels; ++i) {
        matrix.pack(columns.begin[i], columns.size[i], rank, 2,
                    low_rank(m) + i * panel_bytes(rank), narrowed_);
      }
    }
  }

  // Computes rows [p, p + m): the base product, then the extension on each modality's own rows.
  // Text rows are left out of the extension, not multiplied by zero: an adapter may hold NaN or
  // Inf.
  template <typename Row>
  void multiply(Tile<scalar_t>& tile, int64_t p, int m, int64_t expert, const Row& row) const {
    const auto base_row = [&](int i) { return row(p + i); };
    if (product_.direct) {
      tile.multiply_direct(m, product_.K, base_row, weight_, columns_, product_.plan.width);
    } else {
      tile.multiply(0, m, product_.K, base_row, base_, columns_.num_panels, 2, false);
    }
    if (!extended(expert)) return;
    const Extension<scalar_t>& extension = product_.extension;
    for (int64_t modality = 1; modality <= product_.segments.num_modalities; ++modality) {
      const RowRange rows = overlap(product_.segments.modality(expert, modality), {p, p + m});
      if (rows.size() <= 0) continue;
      const auto u_row = [&](int i) { return extension.u + (rows.begin + i) * extension.rank; };
      tile.multiply(rows.begin - p, static_cast<int>(rows.size()), extension.rank, u_row,
                    low_rank(modality), columns_.num_panels, 2, true);
    }
  }

 private:
  // Panels, or the unpacked rows of a weight that is packed: they take no more room.
  static int64_t base_bytes(const ExpertProduct<scalar_t>& product) {
    if (product.direct && !product.packed) return 0;
    return product.plan.panels * panel_bytes(product.K);
  }
  static int64_t unpacked_elements(const ExpertProduct<scalar_t>& product) {
    return product.packed && !product.direct ? product.plan.width * kUnpackDepth : 0;
  }
  void pack_base(const ExpertMatrix<scalar_t>& base) {
    const int64_t K = product_.K, step = base.step(K);
    for (int64_t k = 0; k < K; k += step) {
      const int64_t depth = std::min(step, K - k);
      for (int64_t i = 0; i < columns_.num_panels; ++i) {
        base.part(columns_.begin[i], columns_.size[i], k, depth, unpacked_)
            .pack(0, columns_.size[i], depth, 2, base_ + i * panel_bytes(K) + panel_bytes(k));
      }
    }
  }
  // Unpacks the item's rows of W side by side, and reads them there as if they were stored so.
  void unpack_base(const ExpertMatrix<scalar_t>& base) {
    const int64_t K = product_.K;
    weight_ = {reinterpret_cast<scalar_t*>(base_), K, true};
    for (int64_t i = 0; i < columns_.num_panels; ++i) {
      const int64_t row = i * product_.plan.width;
      base.part(columns_.begin[i], columns_.size[i], 0, K,
                reinterpret_cast<scalar_t*>(base_) + row * K);
      columns_.begin[i] = row;
    }
  }
  static RowRange overlap(RowRange a, RowRange b) {
    return {std::max(a.begin, b.begin), std::min(a.end, b.end)};
  }
  bool extended(int64_t expert) const {
    return product_.extension.rank > 0 && expert < product_.extension.num_experts;
  }
  char* low_rank(int64_t modality) const {
    return low_rank_ + (modality - 1) * panels_ * panel_bytes(product_.extension.rank);
  }

  const ExpertProduct<scalar_t>& product_;
  int64_t panels_;
  char* base_;
  scalar_t* unpacked_;
  char* low_rank_;
  scalar_t* narrowed_;
  Matrix<scalar_t> weight_{};
  ItemColumns columns_;
};

// Calls epilogue(expert, p, m, item, columns, c, ldc) with rows [p, p + m) of the product; panel i of
// the columns is at c + i * plan.width.
template <typename scalar_t, typename Row, typename Base, typename Epilogue>
void expert_products(const ExpertProduct<scalar_t>& product, const std::vector<RowBlock>& blocks,
                     const Row& row, const Base& base, const Epilogue& epilogue) {
  const int64_t ldc = product.plan.item_width(), items = product.plan.num_items();
  const int64_t bytes =
      ItemPanels<scalar_t>::bytes(product) + Tile<scalar_t>::bytes(product.max_depth(), ldc);
  const int64_t total = static_cast<int64_t>(blocks.size()) * items;
  for_each_item(total, bytes, [&](int64_t index, char* memory) {
    const RowBlock& block = blocks[index / items];
    const int64_t item = index % items;
    Scratch scratch(memory);
    ItemPanels<scalar_t> panels(scratch, product);
    Tile<scalar_t> tile(scratch, product.max_depth(), ldc);
    const ItemColumns columns = product.plan.item(item);
    panels.pack(base(block.expert), block.expert, block.rows, columns);
    for_each_tile(block.rows, kernels<scalar_t>().max_rows, [&](int64_t p, int m) {
      panels.multiply(tile, p, m, block.expert, row);
      epilogue(block.expert, p, m, item, columns, tile.c, ldc);
    });
  });
}

// Tokens whose sums one work item holds at once.
constexpr int64_t kMaxTokensPerItem = 4096, kMinTokensPerItem = 256;

// Cuts T tokens into ranges: only where the columns alone would leave threads idle, because every
// range packs all weights again.
inline int64_t tokens_per_item(int64_t tokens, int64_t column_items) {
  const int64_t ranges = std::max<int64_t>(2 * at::get_num_threads() / column_items, 1);
  return std::clamp((tokens + ranges - 1) / ranges, kMinTokensPerItem, kMaxTokensPerItem);
}

// out (T, N)[token] = sum over the token's slots, in the order of their experts, of
// weight(p) * product[p]; zeros for a token without slots. One thread owns a block of columns and
// goes through all experts, so nothing of size (T * K, N) exists and no sum has two owners.
template <typename scalar_t, typename Row, typename Base, typename Weight>
void combined_products(const ExpertProduct<scalar_t>& product, const SlotOrder& order,
                       const Row& row, const Base& base, const Weight& weight, scalar_t* out) {
  using acc_t = acc_type<scalar_t>;
  const auto& kernel = kernels<scalar_t>();
  const ColumnPlan& plan = product.plan;
  const int64_t ldc = plan.item_width(), column_items = plan.num_items();
  const int64_t range = tokens_per_item(order.tokens, column_items);
  const int64_t ranges = (order.tokens + range - 1) / range;
  const int64_t bytes = ItemPanels<scalar_t>::bytes(product) +
                        Tile<scalar_t>::bytes(product.max_depth(), ldc) +
                        Scratch::bytes<acc_t>(std::min(range, order.tokens) * ldc) +
                        Scratch::bytes<acc_t*>(kernel.max_rows) +
                        Scratch::bytes<acc_t>(kernel.max_rows);
  for_each_item(ranges * column_items, bytes, [&](int64_t index, char* memory) {
    const int64_t first = index / column_items * range;
    const int64_t last = std::min(first + range, order.tokens);
    Scratch scratch(memory);
    ItemPanels<scalar_t> panels(scratch, product);
    Tile<scalar_t> tile(scratch, product.max_depth(), ldc);
    acc_t* sums = scratch.take<acc_t>((last - first) * ldc);
    acc_t** targets = scratch.take<acc_t*>(kernel.max_rows);
    acc_t* weights = scratch.take<acc_t>(kernel.max_rows);
    std::fill(sums, sums + (last - first) * ldc, acc_t(0));
    const ItemColumns columns = plan.item(index % column_items);
    for (int64_t e = 0; e < product.segments.num_experts; ++e) {
      const RowRange rows = product.segments.expert(e);
      if (rows.size() == 0) continue;
      bool packed = false;  // with the first row of this expert in the range
      order.for_each_run(product.segments, e, first, last, [&](RowRange run) {
        if (!packed) panels.pack(base(e), e, rows, columns);
        packed = true;
        for_each_tile(run, kernel.max_rows, [&](int64_t p, int m) {
          for (int i = 0; i < m; ++i) {
            targets[i] = sums + (order.token(p + i) - first) * ldc;
            weights[i] = weight(p + i);
            for (int64_t j = 0; j < ldc; j += 16) __builtin_prefetch(targets[i] + j, 1);
          }
          panels.multiply(tile, p, m, e, row);
          kernel.add_rows(m, columns.num_panels * plan.width, tile.c, ldc, weights, targets);
        });
      });
    }
    for (int64_t t = first; t < last; ++t) {
      for (int64_t i = 0; i < columns.num_panels; ++i) {
        kernel.store(sums + (t - first) * ldc + i * plan.width, acc_t(1),
                     out + t * plan.num_columns + columns.begin[i], columns.size[i]);
      }
    }
  });
}

// A parameter whose gradient sums over these rows, in this order.
struct GradientGroup {
  std::vector<RowRange> rows;
};

// One rectangle of one group's gradient, at most kOuterHeight high.
struct OuterItem {
  int64_t group;
  int64_t row, num_rows;
  int64_t column, num_columns;
};

template <typename scalar_t>
class OuterAccumulator {
 public:
  using acc_t = acc_type<scalar_t>;

  // widest: columns of an item, a multiple of kOuterPanels panels; highest: its rows.
  OuterAccumulator(char* memory, const PanelShape& shape, int64_t widest, int64_t highest)
      : shape_(shape), ldc_(widest) {
    Scratch scratch(memory);
    rows_ = scratch.take<const scalar_t*>(kRowsPerChunk);
    left_ = scratch.take<acc_t>(kRowsPerChunk * kOuterHeight);
    packed_left_ = scratch.take<acc_t>(kRowsPerChunk * kOuterHeight);
    panels_ = scratch.take<char>(kOuterPanels * panel_bytes(shape, kRowsPerChunk));
    c_ = scratch.take<acc_t>(highest * ldc_);
  }
  static int64_t bytes(const PanelShape& shape, int64_t widest, int64_t highest) {
    return Scratch::bytes<const scalar_t*>(kRowsPerChunk) +
           2 * Scratch::bytes<acc_t>(kRowsPerChunk * kOuterHeight) +
           Scratch::bytes<char>(kOuterPanels * panel_bytes(shape, kRowsPerChunk)) +
           Scratch::bytes<acc_t>(highest * widest);
  }

  void clear(const OuterItem& item) { std::fill(c_, c_ + item.num_rows * ldc_, acc_t(0)); }

  template <typename Left, typename Right>
  void add(const OuterItem& item, RowRange rows, const Left& left, const Right& right) {
    for (int64_t p = rows.begin; p < rows.end; p += kRowsPerChunk) {
      add_chunk(item, {p, std::min(p + kRowsPerChunk, rows.end)}, left, right);
    }
  }
  const acc_t* values() const { return c_; }
  int64_t ldc() const { return ldc_; }

 private:
  template <typename Left, typename Right>
  void add_chunk(const OuterItem& item, RowRange rows, const Left& left, const Right& right) {
    const auto& kernel = kernels<scalar_t>();
    for (int64_t k = 0; k < rows.size(); ++k) {
      rows_[k] = right(rows.begin + k);
      left(item, rows.begin + k, left_ + k * kOuterHeight);
    }
    kernel.pack_left(left_, kOuterHeight, item.num_rows, rows.size(), packed_left_);
    const int64_t step = kOuterPanels * shape_.width;
    for (int64_t column = 0; column < item.num_columns; column += step) {
      const int64_t columns = std::min(step, item.num_columns - column);
      const int num_panels = pack_right(item.column + column, columns, rows.size());
      for_each_tile({0, item.num_rows}, kernel.max_rows, [&](int64_t i, int m) {
        kernel.tile_kmajor(m, rows.size(), packed_left_ + i, kOuterHeight, panels_, num_panels,
                           shape_.nv, c_ + i * ldc_ + column, ldc_);
      });
    }
  }

  // Packs columns [column, column + num_columns) of `count` rows; returns the number of panels.
  int pack_right(int64_t column, int64_t num_columns, int64_t count) const {
    const auto& kernel = kernels<scalar_t>();
    const auto num_panels = static_cast<int>((num_columns + shape_.width - 1) / shape_.width);
    for (int64_t k = 0; k < count; k += kPackRows) {
      for (int64_t i = 0; i < num_panels; ++i) {
        const int64_t j = i * shape_.width;
        kernel.pack_rows(rows_ + k, column + j, std::min(shape_.width, num_columns - j),
                         std::min(kPackRows, count - k), count - k, shape_.nv,
                         panels_ + i * panel_bytes(shape_, count) + panel_bytes(shape_, k));
      }
    }
    return num_panels;
  }
  static int64_t panel_bytes(const PanelShape& shape, int64_t count) {
    return kernels<scalar_t>().panel_bytes(count, shape.nv);
  }

  PanelShape shape_;
  int64_t ldc_;
  const scalar_t** rows_;
  acc_t* left_;
  acc_t* packed_left_;
  char* panels_;
  acc_t* c_;
};

// Columns of an item: several times `narrow` where its height is small, so that the left operand is
// packed less often, but not so many that threads would be idle. No element's sum depends on it.
inline int64_t outer_step(int64_t narrow, int64_t highest, int64_t width, int64_t groups) {
  int64_t times = std::min(kOuterHeight / highest, (width + narrow - 1) / narrow);
  while (times > 1 && groups * ((width + times * narrow - 1) / (times * narrow)) <
                          4 * at::get_num_threads()) {
    --times;
  }
  return times * narrow;
}

// For every group, G (height, width) = sum over its rows p of left(p)^T right(p).
// left(item, p, dst) writes the item's part of row p; write(item, values, ld) takes a finished
// rectangle, zeros for a group without rows. Each element is summed by one thread, in row order.
template <typename scalar_t, typename Left, typename Right, typename Write>
void wgrad(const std::vector<GradientGroup>& groups, int64_t height, int64_t width,
           const Left& left, const Right& right, const Write& write) {
  const PanelShape shape = panel_shape<scalar_t>(width);
  const int64_t highest = std::min(kOuterHeight, height);
  const int64_t step =
      outer_step(kOuterPanels * shape.width, highest, width, static_cast<int64_t>(groups.size()));
  std::vector<OuterItem> items;
  for (int64_t g = 0; g < static_cast<int64_t>(groups.size()); ++g) {
    for (int64_t i = 0; i < height; i += kOuterHeight) {
      for (int64_t j = 0; j < width; j += step) {
        items.push_back({g, i, std::min(kOuterHeight, height - i), j, std::min(step, width - j)});
      }
    }
  }
  const int64_t bytes = OuterAccumulator<scalar_t>::bytes(shape, step, highest);
  for_each_item(static_cast<int64_t>(items.size()), bytes, [&](int64_t index, char* memory) {
    const OuterItem& item = items[index];
    OuterAccumulator<scalar_t> sum(memory, shape, step, highest);
    sum.clear(item);
    for (const RowRange rows : groups[item.group].rows) sum.add(item, rows, left, right);
    write(item, sum.values(), sum.ldc());
  });
}

}  // namespace moe_kernels::cpu
