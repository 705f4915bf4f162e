// The three shapes of matrix product that the ops are made of, over rows in sorted order:
// project_rows (skinny, adapted rows only), expert_products (base weight plus its low-rank
// extension in one accumulator) and outer_products (parameter gradients).
#pragma once

#include <algorithm>
#include <vector>

#include "gemm.h"
#include "parallel.h"
#include "segments.h"

namespace moe_kernels::cpu {

// Rows of one expert per work item: enough to make packing the weight cheap beside the product.
constexpr int64_t kRowsPerItem = 768;
// Rows per item of a skinny product, whose weight is small.
constexpr int64_t kRowsPerProjection = 192;
// Rows summed between two visits to an item's accumulator, and its height.
constexpr int64_t kRowsPerChunk = 256;
constexpr int64_t kOuterHeight = 96;
// Panels side by side in one work item.
constexpr int64_t kPanels = 2;

// Operand B of a product: W itself (K, N), or the transpose of W (N, K).
template <typename scalar_t>
struct Matrix {
  const scalar_t* data;
  int64_t ld;
  bool transposed;

  void pack(int64_t column, int64_t n, int64_t K, int nv, void* panel) const {
    if (transposed) {
      kernels<scalar_t>().pack_transposed(data + column * ld, ld, n, K, nv, panel);
    } else {
      kernels<scalar_t>().pack(data + column, ld, n, K, nv, panel);
    }
  }
};

// One (rows, columns) matrix per modality and expert, or per modality alone (shared).
template <typename scalar_t>
struct AdapterStack {
  const scalar_t* data = nullptr;
  int64_t num_experts = 0;  // 1 when shared by all
  int64_t rows = 0;
  int64_t columns = 0;
  bool transposed = false;

  Matrix<scalar_t> at(int64_t expert, int64_t modality) const {
    const int64_t index = (modality - 1) * num_experts + (num_experts == 1 ? 0 : expert);
    return {data + index * rows * columns, columns, transposed};
  }
  AdapterStack t() const {
    AdapterStack other = *this;
    other.transposed = !transposed;
    return other;
  }
};

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

// Calls f(p, m) for the register tiles of the rows: as even as the kernels' limit allows.
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

  const scalar_t** rows;
  acc_t* wide;
  acc_t* c;
  int64_t ldc;
};

// store(p, block, values) gets row(p) (K,) @ stack.at(expert, modality) (K, N), for all rows of
// the blocks.
template <typename scalar_t, typename Row, typename Store>
void project_rows(const std::vector<RowBlock>& blocks, int64_t K, int64_t N, const Row& row,
                  const AdapterStack<scalar_t>& stack, const Store& store) {
  const auto& kernel = kernels<scalar_t>();
  const PanelShape panels = panel_shape<scalar_t>(N);
  const int64_t panel_bytes = kernel.panel_bytes(K, panels.nv);
  const int64_t ldc = panels.count * panels.width;
  const int64_t bytes =
      Scratch::bytes<char>(panels.count * panel_bytes) + Tile<scalar_t>::bytes(K, ldc);
  for_each_item(static_cast<int64_t>(blocks.size()), bytes, [&](int64_t item, char* memory) {
    const RowBlock& block = blocks[item];
    Scratch scratch(memory);
    char* packed = scratch.take<char>(panels.count * panel_bytes);
    Tile<scalar_t> tile(scratch, K, ldc);
    const Matrix<scalar_t> matrix = stack.at(block.expert, block.modality);
    for (int64_t j = 0; j < panels.count; ++j) {
      const int64_t column = j * panels.width;
      matrix.pack(column, std::min(panels.width, N - column), K, panels.nv,
                  packed + j * panel_bytes);
    }
    for_each_tile(block.rows, kernel.max_rows, [&](int64_t p, int m) {
      tile.multiply(0, m, K, [&](int i) { return row(p + i); }, packed, panels.count, panels.nv,
                    false);
      for (int i = 0; i < m; ++i) store(p + i, block, tile.c + i * ldc);
    });
  });
}

// The columns of one work item, as kPanels panels: panel i holds columns
// [begin[i], begin[i] + size[i]) of the product.
struct ItemColumns {
  int64_t begin[kPanels];
  int64_t size[kPanels];
  int64_t num_panels;
};

// How the columns of a product are cut: adjacent panels, or a panel of the first half beside the
// same one of the second half (gate beside up).
struct ColumnPlan {
  int64_t num_columns;
  bool paired_halves;
  int64_t width;

  int64_t columns_per_panel_row() const { return paired_halves ? num_columns / 2 : num_columns; }
  int64_t num_items() const {
    const int64_t step = paired_halves ? width : kPanels * width;
    return (columns_per_panel_row() + step - 1) / step;
  }
  ItemColumns item(int64_t j) const {
    const int64_t limit = columns_per_panel_row();
    if (paired_halves) {
      const int64_t begin = j * width, size = std::min(width, limit - begin);
      return {{begin, limit + begin}, {size, size}, kPanels};
    }
    ItemColumns columns{};
    for (int64_t begin = j * kPanels * width; columns.num_panels < kPanels && begin < limit;
         begin += width) {
      columns.begin[columns.num_panels] = begin;
      columns.size[columns.num_panels++] = std::min(width, limit - begin);
    }
    return columns;
  }
};

template <typename scalar_t>
ColumnPlan column_plan(int64_t num_columns, bool paired_halves = false) {
  return {num_columns, paired_halves, 2 * kernels<scalar_t>().vector};
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

// The packed operands of one work item.
template <typename scalar_t>
class ItemPanels {
 public:
  ItemPanels(Scratch& scratch, int64_t K, const Extension<scalar_t>& extension,
             int64_t num_modalities)
      : K_(K),
        base_(scratch.take<char>(kPanels * panel_bytes(K))),
        extension_(extension),
        low_rank_(scratch.take<char>(num_modalities * kPanels * panel_bytes(extension.rank))) {}

  static int64_t bytes(int64_t K, int64_t rank, int64_t num_modalities) {
    return Scratch::bytes<char>(kPanels * panel_bytes(K)) +
           Scratch::bytes<char>(num_modalities * kPanels * panel_bytes(rank));
  }
  static int64_t panel_bytes(int64_t K) { return kernels<scalar_t>().panel_bytes(K, 2); }

  void pack(const Matrix<scalar_t>& base, const RowBlock& block, const Segments& segments,
            const ItemColumns& columns) {
    columns_ = columns;
    pack_matrix(base, K_, base_);
    if (!extended(block.expert)) return;
    for (int64_t m = 1; m <= segments.num_modalities; ++m) {
      if (overlap(segments.modality(block.expert, m), block.rows).size() <= 0) continue;
      pack_matrix(extension_.stack.at(block.expert, m), extension_.rank, low_rank(m));
    }
  }

  // Rows [p, p + m): the base product, then the extension on each modality's own rows. Text rows
  // are left out of it, not multiplied by zero: an adapter may hold NaN or Inf.
  template <typename Row>
  void multiply(Tile<scalar_t>& tile, int64_t p, int m, int64_t expert, const Segments& segments,
                const Row& row) const {
    tile.multiply(0, m, K_, [&](int i) { return row(p + i); }, base_, columns_.num_panels, 2,
                  false);
    if (!extended(expert)) return;
    for (int64_t modality = 1; modality <= segments.num_modalities; ++modality) {
      const RowRange rows = overlap(segments.modality(expert, modality), {p, p + m});
      if (rows.size() <= 0) continue;
      const auto u_row = [&](int i) { return extension_.u + (rows.begin + i) * extension_.rank; };
      tile.multiply(rows.begin - p, static_cast<int>(rows.size()), extension_.rank, u_row,
                    low_rank(modality), columns_.num_panels, 2, true);
    }
  }

 private:
  static RowRange overlap(RowRange a, RowRange b) {
    return {std::max(a.begin, b.begin), std::min(a.end, b.end)};
  }
  bool extended(int64_t expert) const {
    return extension_.rank > 0 && expert < extension_.num_experts;
  }
  char* low_rank(int64_t modality) const {
    return low_rank_ + (modality - 1) * kPanels * panel_bytes(extension_.rank);
  }
  void pack_matrix(const Matrix<scalar_t>& matrix, int64_t K, char* packed) const {
    for (int64_t i = 0; i < columns_.num_panels; ++i) {
      matrix.pack(columns_.begin[i], columns_.size[i], K, 2, packed + i * panel_bytes(K));
    }
  }

  int64_t K_;
  char* base_;
  const Extension<scalar_t>& extension_;
  char* low_rank_;
  ItemColumns columns_{};
};

// epilogue(p, m, expert, item, columns, c, ldc) gets rows [p, p + m) of
// row(p) (K,) @ base(expert) (K, N) + extension, panel i of the columns at c + i * plan.width.
template <typename scalar_t, typename Row, typename Base, typename Epilogue>
void expert_products(const std::vector<RowBlock>& blocks, const Segments& segments,
                     const ColumnPlan& plan, int64_t K, const Row& row, const Base& base,
                     const Extension<scalar_t>& extension, const Epilogue& epilogue) {
  const int64_t ldc = kPanels * plan.width, items = plan.num_items();
  const int64_t bytes = ItemPanels<scalar_t>::bytes(K, extension.rank, segments.num_modalities) +
                        Tile<scalar_t>::bytes(std::max(K, extension.rank), ldc);
  const int64_t total = static_cast<int64_t>(blocks.size()) * items;
  for_each_item(total, bytes, [&](int64_t index, char* memory) {
    const RowBlock& block = blocks[index / items];
    const int64_t item = index % items;
    Scratch scratch(memory);
    ItemPanels<scalar_t> panels(scratch, K, extension, segments.num_modalities);
    Tile<scalar_t> tile(scratch, std::max(K, extension.rank), ldc);
    const ItemColumns columns = plan.item(item);
    panels.pack(base(block.expert), block, segments, columns);
    for_each_tile(block.rows, kernels<scalar_t>().max_rows, [&](int64_t p, int m) {
      panels.multiply(tile, p, m, block.expert, segments, row);
      epilogue(p, m, block.expert, item, columns, tile.c, ldc);
    });
  });
}

// Copies a tile to rows of a row-major (rows, ld) matrix.
template <typename acc_t>
void copy_tile(const acc_t* c, int64_t ldc, int m, const ItemColumns& columns, int64_t width,
               acc_t* dst, int64_t ld) {
  for (int i = 0; i < m; ++i) {
    for (int64_t panel = 0; panel < columns.num_panels; ++panel) {
      const acc_t* src = c + i * ldc + panel * width;
      std::copy(src, src + columns.size[panel], dst + i * ld + columns.begin[panel]);
    }
  }
}

// A parameter whose gradient sums over these rows, in this order.
struct GradientGroup {
  std::vector<RowRange> rows;
};

// One rectangle of one group's gradient.
struct OuterItem {
  int64_t group;
  int64_t row, num_rows;
  int64_t column, num_columns;
};

template <typename scalar_t>
class OuterAccumulator {
 public:
  using acc_t = acc_type<scalar_t>;

  OuterAccumulator(char* memory, const PanelShape& shape)
      : shape_(shape), ldc_(kPanels * shape.width) {
    Scratch scratch(memory);
    rows_ = scratch.take<const scalar_t*>(kRowsPerChunk);
    left_ = scratch.take<acc_t>(kRowsPerChunk * kOuterHeight);
    panels_ = scratch.take<acc_t>(kRowsPerChunk * ldc_);
    c_ = scratch.take<acc_t>(kOuterHeight * ldc_);
  }
  static int64_t bytes(const PanelShape& shape) {
    const int64_t ldc = kPanels * shape.width;
    return Scratch::bytes<const scalar_t*>(kRowsPerChunk) +
           Scratch::bytes<acc_t>(kRowsPerChunk * kOuterHeight) +
           Scratch::bytes<acc_t>(kRowsPerChunk * ldc) + Scratch::bytes<acc_t>(kOuterHeight * ldc);
  }

  void clear() { std::fill(c_, c_ + kOuterHeight * ldc_, acc_t(0)); }

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
    int num_panels = 0;
    for (int64_t j = 0; j < item.num_columns; j += shape_.width) {
      const int64_t size = std::min(shape_.width, item.num_columns - j);
      kernel.pack_rows(rows_, item.column + j, size, rows.size(), shape_.nv,
                       panels_ + num_panels++ * rows.size() * shape_.width);
    }
    for_each_tile({0, item.num_rows}, kernel.max_rows, [&](int64_t i, int m) {
      kernel.tile_kmajor(m, rows.size(), left_ + i, kOuterHeight, panels_, num_panels, shape_.nv,
                         c_ + i * ldc_, ldc_);
    });
  }

  PanelShape shape_;
  int64_t ldc_;
  const scalar_t** rows_;
  acc_t* left_;
  acc_t* panels_;
  acc_t* c_;
};

// For every group, G (height, width) = sum over its rows p of left(p)^T right(p).
// left(item, p, dst) writes the item's part of row p; write(item, values, ld) takes a finished
// rectangle, zeros for a group without rows. Each element is summed by one thread, in row order.
template <typename scalar_t, typename Left, typename Right, typename Write>
void outer_products(const std::vector<GradientGroup>& groups, int64_t height, int64_t width,
                    const Left& left, const Right& right, const Write& write) {
  const PanelShape shape = panel_shape<scalar_t>(width);
  const int64_t step = kPanels * shape.width;
  std::vector<OuterItem> items;
  for (int64_t g = 0; g < static_cast<int64_t>(groups.size()); ++g) {
    for (int64_t i = 0; i < height; i += kOuterHeight) {
      for (int64_t j = 0; j < width; j += step) {
        items.push_back({g, i, std::min(kOuterHeight, height - i), j, std::min(step, width - j)});
      }
    }
  }
  const int64_t bytes = OuterAccumulator<scalar_t>::bytes(shape);
  for_each_item(static_cast<int64_t>(items.size()), bytes, [&](int64_t index, char* memory) {
    const OuterItem& item = items[index];
    OuterAccumulator<scalar_t> sum(memory, shape);
    sum.clear();
    for (const RowRange rows : groups[item.group].rows) sum.add(item, rows, left, right);
    write(item, sum.values(), sum.ldc());
  });
}

}  // namespace moe_kernels::cpu
