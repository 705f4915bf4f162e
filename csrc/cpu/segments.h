// Positions of each expert's and modality's rows in the sorted order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace moe_kernels::cpu {

struct RowRange {
  int64_t begin;
  int64_t end;
  int64_t size() const { return end - begin; }
};

struct Segments {
  const int64_t* offsets;  // (num_experts * (num_modalities + 1) + 1,)
  int64_t num_experts;
  int64_t num_modalities;

  int64_t at(int64_t expert, int64_t modality) const {
    return offsets[expert * (num_modalities + 1) + modality];
  }
  RowRange expert(int64_t e) const { return {at(e, 0), at(e + 1, 0)}; }
  // Returns the rows with any adapter, which follow the expert's text rows.
  RowRange adapted(int64_t e) const { return {at(e, std::min<int64_t>(1, num_modalities + 1)),
                                              at(e + 1, 0)}; }
  RowRange modality(int64_t e, int64_t m) const { return {at(e, m), at(e, m + 1)}; }
  int64_t num_rows() const { return at(num_experts, 0); }
};

// One piece of work over rows: of `expert`, and of `modality` where that matters.
struct RowBlock {
  int64_t expert;
  int64_t modality;
  RowRange rows;
};

inline void append_blocks(std::vector<RowBlock>& blocks, int64_t expert, int64_t modality,
                          RowRange rows, int64_t block) {
  for (int64_t p = rows.begin; p < rows.end; p += block) {
    blocks.push_back({expert, modality, {p, std::min(p + block, rows.end)}});
  }
}

// Calls fn(begin, end) on every range of rows without an adapter, up to row `total`: text rows,
// rows of experts from num_adapted on, and what was not dispatched.
template <typename Fn>
void for_each_unadapted(const Segments& segments, int64_t num_adapted, int64_t total, Fn&& fn) {
  int64_t begin = 0;
  for (int64_t e = 0; e < num_adapted; ++e) {
    const RowRange adapted = segments.adapted(e);
    if (adapted.size() == 0) continue;
    fn(begin, adapted.begin);
    begin = adapted.end;
  }
  fn(begin, total);
}

// Slot, and so token, of each row in sorted order.
struct SlotOrder {
  const int64_t* perm;  // ascending within a segment
  int64_t top_k;
  int64_t tokens;

  int64_t token(int64_t p) const { return perm[p] / top_k; }

  // Calls fn(run) for the runs of an expert's rows whose tokens lie in [first, last).
  template <typename Fn>
  void for_each_run(const Segments& segments, int64_t expert, int64_t first, int64_t last,
                    const Fn& fn) const {
    if (first == 0 && last == tokens) {
      fn(segments.expert(expert));
      return;
    }
    for (int64_t m = 0; m <= segments.num_modalities; ++m) {
      const RowRange rows = segments.modality(expert, m);
      const int64_t* end = perm + rows.end;
      const int64_t* from = std::lower_bound(perm + rows.begin, end, first * top_k);
      const int64_t* to = std::lower_bound(from, end, last * top_k);
      if (from < to) fn(RowRange{from - perm, to - perm});
    }
  }
};

// Blocks of the adapted rows of experts [0, num_experts).
inline std::vector<RowBlock> adapted_blocks(const Segments& segments, int64_t num_experts,
                                            int64_t block) {
  std::vector<RowBlock> blocks;
  for (int64_t e = 0; e < num_experts; ++e) {
    for (int64_t m = 1; m <= segments.num_modalities; ++m) {
      append_blocks(blocks, e, m, segments.modality(e, m), block);
    }
  }
  return blocks;
}

}  // namespace moe_kernels::cpu
