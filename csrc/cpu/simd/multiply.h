// The products of a few rows with panels.

// Steps of k summed in one chain: long chains lose accuracy with the square root of their length.
// Even, for the pairs of bf16.
constexpr int64_t kChain = 256;

// Operand A in the form that the products read: one pointer per row, or k-major.
template <typename acc_t>
struct RowsOperand {
  const acc_t* const* rows;
  inline acc_t operator()(int i, int64_t k) const { return rows[i][k]; }
};
template <typename acc_t>
struct KMajorOperand {
  const acc_t* a;
  int64_t lda;
  inline acc_t operator()(int i, int64_t k) const { return a[k * lda + i]; }
};

template <typename acc_t, int MR, int NV>
struct Registers {
  static constexpr int L = VectorOf<acc_t>::size;
  Vector<acc_t> c[MR][NV];

  inline void clear() {
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) c[i][j] = Vector<acc_t>{};
    }
  }
  // to = or += c
  inline void write(acc_t* to, int64_t ldc, bool accumulate) const {
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) {
        acc_t* dst = to + i * ldc + j * L;
        store_vector<acc_t>(dst, accumulate ? load_vector<acc_t>(dst) + c[i][j] : c[i][j]);
      }
    }
  }
};

// Calls f(begin, end) for each chain of [0, K).
template <typename F>
inline void for_each_chain(int64_t K, F f) {
  for (int64_t begin = 0; begin < K; begin += kChain) {
    f(begin, K - begin < kChain ? K : begin + kChain);
  }
}

template <typename acc_t, int MR, int NV, typename Operand>
inline void multiply_chain(Operand operand, int64_t begin, int64_t end, const acc_t* panel,
                           Registers<acc_t, MR, NV>& reg) {
  constexpr int L = VectorOf<acc_t>::size;
#pragma GCC unroll 4
  for (int64_t k = begin; k < end; ++k) {
    Vector<acc_t> b[NV];
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) b[j] = load_vector<acc_t>(panel + (k * NV + j) * L);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const Vector<acc_t> a = operand(i, k) - Vector<acc_t>{};
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) reg.c[i][j] = fma(a, b[j], reg.c[i][j]);
    }
  }
}

template <typename acc_t, int MR, int NV, typename Operand>
void multiply(Operand operand, int64_t K, const acc_t* panel, acc_t* c, int64_t ldc,
              bool accumulate) {
  for_each_chain(K, [&](int64_t begin, int64_t end) {
    Registers<acc_t, MR, NV> reg;
    reg.clear();
    multiply_chain<acc_t, MR, NV>(operand, begin, end, panel, reg);
    reg.write(c, ldc, accumulate || begin > 0);
  });
}

// Calls f(std::integral_constant<int, m>) for 1 <= m <= MR.
template <int MR, typename F>
inline void with_rows(int m, F f) {
  if constexpr (MR > 0) {
    if (m == MR) return f(std::integral_constant<int, MR>{});
    with_rows<MR - 1>(m, f);
  }
}

template <typename acc_t, typename Operand>
void multiply_panels(Operand operand, int m, int64_t K, const acc_t* panels, int num_panels,
                     int nv, acc_t* c, int64_t ldc, bool accumulate) {
  const int64_t width = nv * VectorOf<acc_t>::size;
  with_rows<MOE_MAX_ROWS>(m, [&](auto rows) {
    for (int p = 0; p < num_panels; ++p) {
      const acc_t* panel = panels + p * K * width;
      if (nv == 2) {
        multiply<acc_t, rows(), 2>(operand, K, panel, c + p * width, ldc, accumulate);
      } else {
        multiply<acc_t, rows(), 1>(operand, K, panel, c + p * width, ldc, accumulate);
      }
    }
  });
}

// Rows are copied, widened where they must be, when that pays: rows that lie a multiple of 4 KiB
// apart share one set of the first-level cache, and more of them than it has ways evict each other.
template <typename scalar_t>
void tile(int m, int64_t K, const scalar_t* const* rows, const void* panels, int num_panels,
          int nv, acc_type<scalar_t>* c, int64_t ldc, bool accumulate,
          acc_type<scalar_t>* scratch) {
  using acc_t = acc_type<scalar_t>;
  const bool copy = !std::is_same_v<scalar_t, acc_t> || K >= 256;
  const int64_t stride = scratch_stride(K);
  const acc_t* wide[MOE_MAX_ROWS];
  for (int i = 0; i < m; ++i) {
    if (copy) load_scaled<scalar_t>(rows[i], acc_t(1), scratch + i * stride, K);
    wide[i] = copy ? scratch + i * stride : reinterpret_cast<const acc_t*>(rows[i]);
  }
  multiply_panels<acc_t>(RowsOperand<acc_t>{wide}, m, K, static_cast<const acc_t*>(panels),
                         num_panels, nv, c, ldc, accumulate);
}

template <typename acc_t>
void tile_kmajor(int m, int64_t K, const void* a, int64_t lda, const void* panels, int num_panels,
                 int nv, acc_t* c, int64_t ldc) {
  multiply_panels<acc_t>(KMajorOperand<acc_t>{static_cast<const acc_t*>(a), lda}, m, K,
                         static_cast<const acc_t*>(panels), num_panels, nv, c, ldc, true);
}

#if MOE_LEVEL >= 3
template <int NV>
inline void load_pairs(const uint32_t* panel, __m512bh* b) {
#pragma GCC unroll 2
  for (int j = 0; j < NV; ++j) b[j] = (__m512bh)_mm512_loadu_si512(panel + j * 16);
}

// Pairs of operand A: one pointer per row, or pairs k-major.
struct RowPairs {
  const c10::BFloat16* const* rows;
  inline int32_t operator()(int i, int64_t pair) const {
    int32_t both;
    __builtin_memcpy(&both, rows[i] + 2 * pair, sizeof(both));
    return both;
  }
  // The last pair of an odd K.
  inline int32_t last(int i, int64_t pair) const { return rows[i][2 * pair].x; }
};
struct KMajorPairs {
  const int32_t* a;
  int64_t lda;
  inline int32_t operator()(int i, int64_t pair) const { return a[pair * lda + i]; }
  // pack_left_bf16 has put a zero beside it.
  inline int32_t last(int i, int64_t pair) const { return a[pair * lda + i]; }
};

template <int MR, int NV, typename Operand>
inline void multiply_chain_bf16(Operand operand, int64_t begin, int64_t end, const uint32_t* panel,
                                Registers<float, MR, NV>& reg) {
  const auto step = [&](int64_t pair, auto load_a) {
    __m512bh b[NV];
    load_pairs<NV>(panel + pair * NV * 16, b);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const __m512bh a = (__m512bh)_mm512_set1_epi32(load_a(i));
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) {
        reg.c[i][j] = (Vector<float>)_mm512_dpbf16_ps((__m512)reg.c[i][j], b[j], a);
      }
    }
  };
#pragma GCC unroll 4
  for (int64_t pair = begin / 2; pair < end / 2; ++pair) {
    step(pair, [&](int i) { return operand(i, pair); });
  }
  if (end % 2) step(end / 2, [&](int i) { return operand.last(i, end / 2); });
}

template <int MR, int NV, typename Operand>
void multiply_bf16(Operand operand, int64_t K, const uint32_t* panel, float* c, int64_t ldc,
                   bool accumulate) {
  for_each_chain(K, [&](int64_t begin, int64_t end) {
    Registers<float, MR, NV> reg;
    reg.clear();
    multiply_chain_bf16<MR, NV>(operand, begin, end, panel, reg);
    reg.write(c, ldc, accumulate || begin > 0);
  });
}

template <typename Operand>
void multiply_panels_bf16(Operand operand, int m, int64_t K, const void* panels, int num_panels,
                          int nv, float* c, int64_t ldc, bool accumulate) {
  const int64_t width = nv * VectorOf<float>::size;
  const int64_t stride = (K + 1) / 2 * width;
  with_rows<MOE_MAX_ROWS>(m, [&](auto count) {
    for (int p = 0; p < num_panels; ++p) {
      const uint32_t* panel = static_cast<const uint32_t*>(panels) + p * stride;
      if (nv == 2) {
        multiply_bf16<count(), 2>(operand, K, panel, c + p * width, ldc, accumulate);
      } else {
        multiply_bf16<count(), 1>(operand, K, panel, c + p * width, ldc, accumulate);
      }
    }
  });
}

void tile_bf16(int m, int64_t K, const c10::BFloat16* const* rows, const void* panels,
               int num_panels, int nv, float* c, int64_t ldc, bool accumulate, float*) {
  multiply_panels_bf16(RowPairs{rows}, m, K, panels, num_panels, nv, c, ldc, accumulate);
}

void tile_kmajor_bf16(int m, int64_t K, const void* a, int64_t lda, const void* panels,
                      int num_panels, int nv, float* c, int64_t ldc) {
  multiply_panels_bf16(KMajorPairs{static_cast<const int32_t*>(a), lda}, m, K, panels, num_panels,
                       nv, c, ldc, true);
}
#endif

// ---- few rows ----------------------------------------------------------------------------------
// C = A W^T straight from W (n, K): with few rows per weight the time goes into reading it, and
// packing would read it twice. Each element is one chain of vectors over k, summed over the lanes
// at the end, whatever the number of rows.

template <typename scalar_t>
struct Dot {
  using acc_t = acc_type<scalar_t>;
  using Operand = Vector<acc_t>;
  static constexpr int step = VectorOf<acc_t>::size;
  static inline Operand load(const scalar_t* src, int64_t left) { return get(src, left); }
  static inline Vector<acc_t> add(Operand a, Operand b, Vector<acc_t> sum) { return fma(a, b, sum); }
};

#if MOE_LEVEL >= 3
template <>
struct Dot<c10::BFloat16> {
  using Operand = __m512bh;
  static constexpr int step = 32;
  static inline Operand load(const c10::BFloat16* src, int64_t left) {
    Vector<int32_t> pairs{};
    __builtin_memcpy(&pairs, src, left >= step ? sizeof(pairs) : left * sizeof(*src));
    return (Operand)(__m512i)pairs;
  }
  static inline Vector<float> add(Operand a, Operand b, Vector<float> sum) {
    return (Vector<float>)_mm512_dpbf16_ps((__m512)sum, a, b);
  }
};
#endif

constexpr int kDotColumns = 4;
constexpr int64_t kDotAhead = 16;  // rows of W that are prefetched before they are read
constexpr int64_t kDotStreamedBytes = 16 * 1024;  // half of a usual first-level cache
constexpr int kDotRows = MOE_LEVEL >= 2 ? 4 : 2;  // the most that keep the sums in registers

// The sums over the lanes of four vectors.
template <typename acc_t>
inline void sum_four(Vector<acc_t>* sums, acc_t* out) {
  constexpr int L = VectorOf<acc_t>::size;
  if constexpr (L < 4) {
    for (int j = 0; j < 4; ++j) out[j] = sum_lanes<acc_t>(sums[j]);
  } else {
    const auto all = std::make_integer_sequence<int, L>{};
    exchange<acc_t, 1>(sums[0], sums[1], all);
    exchange<acc_t, 1>(sums[2], sums[3], all);
    Vector<acc_t> left = sums[0] + sums[1], right = sums[2] + sums[3];
    exchange<acc_t, 2>(left, right, all);
    acc_t lanes[L];
    store_vector<acc_t>(lanes, left + right);  // lane j belongs to column j % 4
#pragma GCC unroll 4
    for (int half = L / 2; half >= 4; half /= 2) {
      for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    for (int j = 0; j < 4; ++j) out[j] = lanes[j];
  }
}

// sums[i][j] += the products of rows[i] and w[j], lane by lane, for N rows of W from `first` on;
// `ahead`, with row stride ld, is what will be read later in their place, or null.
template <typename scalar_t, int MR, int N>
inline void dot_columns(const scalar_t* const* rows, const scalar_t* const* w, int first,
                        int64_t K, const scalar_t* ahead, int64_t ld,
                        Vector<acc_type<scalar_t>> (*sums)[kDotColumns]) {
  using D = Dot<scalar_t>;
  const auto step = [&](int64_t k, int64_t left) {
    typename D::Operand a[MR];
#pragma GCC unroll 4
    for (int i = 0; i < MR; ++i) a[i] = D::load(rows[i] + k, left);
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      const typename D::Operand b = D::load(w[first + j] + k, left);
#pragma GCC unroll 4
      for (int i = 0; i < MR; ++i) sums[i][j] = D::add(a[i], b, sums[i][j]);
    }
  };
  int64_t k = 0;
  for (; k + D::step <= K; k += D::step) {
    if (ahead) {
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) prefetch(ahead, (first + j) * ld + k);
    }
    step(k, D::step);
  }
  if (k < K) step(k, K - k);
}

// C (MR, kDotColumns) from rows and from four rows of W: one after the other, as they lie in
// memory, or all at once. Each element is summed in the same order.
template <typename scalar_t, int MR>
inline void dot_block(const scalar_t* const* rows, const scalar_t* const* w, int64_t K,
                      const scalar_t* ahead, int64_t ld, bool streamed, acc_type<scalar_t>* c,
                      int64_t ldc) {
  Vector<acc_type<scalar_t>> sums[MR][kDotColumns] = {};
  if (streamed) {
    for (int j = 0; j < kDotColumns; ++j) {
      // One row's worth of arithmetic is so short that the hardware's own prefetching does better.
      const scalar_t* later = MR > 1 ? ahead : nullptr;
      Vector<acc_type<scalar_t>> column[MR][kDotColumns] = {};
      dot_columns<scalar_t, MR, 1>(rows, w, j, K, later, ld, column);
#pragma GCC unroll 4
      for (int i = 0; i < MR; ++i) sums[i][j] = column[i][0];
    }
  } else {
    dot_columns<scalar_t, MR, kDotColumns>(rows, w, 0, K, ahead, ld, sums);
  }
  for (int i = 0; i < MR; ++i) sum_four<acc_type<scalar_t>>(sums[i], c + i * ldc);
}

// C (m, n rounded up to kDotColumns) = A (m, K) @ W^T, W (n, K) with row stride ld. next: the rows
// that will be read after these, or null.
template <typename scalar_t>
void tile_direct(int m, int64_t K, const scalar_t* const* rows, const scalar_t* w, int64_t ld,
                 int64_t n, const scalar_t* next, acc_type<scalar_t>* c, int64_t ldc) {
  // Reading W in one stream is fastest, as long as it is read once and A stays in the first level.
  const bool streamed = m <= kDotRows && m * K * int64_t(sizeof(scalar_t)) <= kDotStreamedBytes;
  for (int64_t j = 0; j < n; j += kDotColumns) {
    const scalar_t* columns[kDotColumns];
    for (int64_t i = 0; i < kDotColumns; ++i) columns[i] = w + (j + i < n ? j + i : n - 1) * ld;
    const int64_t later = j + kDotAhead;
    const scalar_t* ahead = columns[0];  // nothing follows: these are in the cache already
    if (later < n) ahead = w + later * ld;
    if (later >= n && next) ahead = next + (later - n) * ld;
    for (int i = 0; i < m; i += kDotRows) {
      with_rows<kDotRows>(m - i < kDotRows ? m - i : kDotRows, [&](auto count) {
        dot_block<scalar_t, count()>(rows + i, columns, K, ahead, ld, streamed,
                                     c + i * ldc + j, ldc);
      });
    }
  }
}
