// Packs operand B into panels. The data needed next are prefetched into the second-level cache:
// rows are too far apart for the hardware's prefetcher, and share sets of the first-level cache.

// Exchanges the elements of a whose index has bit S with those of b whose index has not.
#ifdef __clang__
template <typename T, int S, int... J>
inline void exchange(Vector<T>& a, Vector<T>& b, std::integer_sequence<int, J...>) {
  constexpr int L = VectorOf<T>::size;
  const Vector<T> low = __builtin_shufflevector(a, b, ((J & S) ? L + J - S : J)...);
  b = __builtin_shufflevector(a, b, ((J & S) ? L + J : J + S)...);
  a = low;
}
#else
// GCC has __builtin_shufflevector from 12 on only.
template <typename T, int S, int... J>
inline void exchange(Vector<T>& a, Vector<T>& b, std::integer_sequence<int, J...>) {
  constexpr int L = VectorOf<T>::size;
  using Index = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  const Vector<T> low = __builtin_shuffle(a, b, Vector<Index>{((J & S) ? L + J - S : J)...});
  b = __builtin_shuffle(a, b, Vector<Index>{((J & S) ? L + J : J + S)...});
  a = low;
}
#endif

// Eklundh's transposition of a square of 4-byte or 8-byte elements held in registers.
template <typename T, int S = 1>
inline void transpose_square(Vector<T>* rows) {
  constexpr int L = VectorOf<T>::size;
  if constexpr (S < L) {
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) {
      if (!(i & S)) exchange<T, S>(rows[i], rows[i + S], std::make_integer_sequence<int, L>{});
    }
    transpose_square<T, 2 * S>(rows);
  }
}

// panel (count, width): element (k, j) = W(j, k) for j < n, 0 beyond. load(j, k, size) gives
// `size` elements of row j from k on, in a vector padded with zeros.
template <typename T, typename Load>
inline void transpose_panel(Load load, int64_t n, int64_t count, int nv, T* panel) {
  constexpr int L = VectorOf<T>::size;
  const int64_t width = nv * L;
  for (int block = 0; block < nv; ++block) {
    const int64_t first = block * L, rows = n - first < L ? n - first : L;
    for (int64_t k = 0; k < count; k += L) {
      const int64_t size = count - k < L ? count - k : L;
      Vector<T> square[L];
      if (rows == L) {
#pragma GCC unroll 16
        for (int j = 0; j < L; ++j) square[j] = load(first + j, k, size);
      } else {
        for (int j = 0; j < L; ++j) square[j] = j < rows ? load(first + j, k, size) : Vector<T>{};
      }
      transpose_square<T>(square);
      T* to = panel + k * width + first;
      if (size == L) {
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) store_vector<T>(to + i * width, square[i]);
      } else {
        for (int i = 0; i < size; ++i) store_vector<T>(to + i * width, square[i]);
      }
    }
  }
}

template <typename scalar_t>
void pack_transposed(const scalar_t* w, int64_t ld, int64_t n, int64_t K, int nv, void* panel) {
  using acc_t = acc_type<scalar_t>;
  constexpr int L = VectorOf<acc_t>::size;
  const auto load = [&](int64_t row, int64_t k, int64_t size) {
    const scalar_t* src = w + row * ld + k;
    prefetch(src, L * ld);
    return get(src, size);
  };
  transpose_panel<acc_t>(load, n, K, nv, static_cast<acc_t*>(panel));
}

// One row of a panel of `width` columns, n of them from src.
template <typename scalar_t>
inline void pack_one_row(const scalar_t* src, int64_t n, int64_t width, acc_type<scalar_t>* dst) {
  constexpr int L = VectorOf<acc_type<scalar_t>>::size;
  for (int64_t j = 0; j < width; j += L) {
    store_vector<acc_type<scalar_t>>(
        dst + j, j < n ? get(src + j, n - j) : Vector<acc_type<scalar_t>>{});
  }
}

// n elements, `elements` further.
template <typename scalar_t>
inline void prefetch_row(const scalar_t* row, int64_t elements, int64_t n) {
  constexpr int64_t line = 64 / sizeof(scalar_t);
  for (int64_t j = 0; j < n; j += line) prefetch(row, elements + j);
}

template <typename scalar_t>
void pack(const scalar_t* b, int64_t ld, int64_t n, int64_t K, int nv, void* panel) {
  using acc_t = acc_type<scalar_t>;
  const int64_t width = nv * VectorOf<acc_t>::size;
  auto* out = static_cast<acc_t*>(panel);
  for (int64_t k = 0; k < K; ++k) {
    const scalar_t* row = b + k * ld;
    prefetch_row(row, kPackRows * ld, n);
    pack_one_row(row, n, width, out + k * width);
  }
}

template <typename scalar_t>
void pack_rows(const scalar_t* const* rows, int64_t column, int64_t n, int64_t K, int64_t total,
               int nv, void* panel) {
  using acc_t = acc_type<scalar_t>;
  const int64_t width = nv * VectorOf<acc_t>::size;
  auto* out = static_cast<acc_t*>(panel);
  for (int64_t k = 0; k < K; ++k) {
    if (k + kPackRows < total) prefetch_row(rows[k + kPackRows], column, n);
    pack_one_row(rows[k] + column, n, width, out + k * width);
  }
}

template <typename acc_t>
void pack_left(const acc_t* left, int64_t ld, int64_t n, int64_t K, void* packed) {
  auto* out = static_cast<acc_t*>(packed);
  for (int64_t k = 0; k < K; ++k) load_scaled<acc_t>(left + k * ld, acc_t(1), out + k * ld, n);
}

#if MOE_LEVEL >= 3
// Panels of pairs (k, k + 1) side by side, as vdpbf16ps reads them.
void pack_transposed_bf16(const c10::BFloat16* w, int64_t ld, int64_t n, int64_t K, int nv,
                          void* panel) {
  constexpr int L = VectorOf<int32_t>::size;
  const auto load = [&](int64_t row, int64_t pair, int64_t size) {
    const c10::BFloat16* src = w + row * ld + 2 * pair;
    prefetch(src, L * ld);
    if (size == L && 2 * (pair + L) <= K) return load_vector<int32_t>(src);
    uint16_t padded[2 * L] = {};
    const int64_t left = K - 2 * pair;
    __builtin_memcpy(padded, src, 2 * (left < 2 * size ? left : 2 * size));
    return load_vector<int32_t>(padded);
  };
  transpose_panel<int32_t>(load, n, (K + 1) / 2, nv, static_cast<int32_t*>(panel));
}

// One row of pairs of a panel of `width` columns: even[j] in the low half, odd[j] in the high one.
// A missing row is null.
inline void pack_pair(const c10::BFloat16* even, const c10::BFloat16* odd, int64_t n,
                      int64_t width, uint32_t* dst) {
  constexpr int L = VectorOf<uint32_t>::size;
  if (n == 2 * L && width == 2 * L) {
    const Vector<uint32_t> lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    // Element j of even, then of odd: bit 5 of an index chooses the second operand.
    const Vector<uint32_t> first = lane | (lane + 2 * L) << 16;
    const __m512i low = _mm512_loadu_si512(even);
    const __m512i high = odd ? _mm512_loadu_si512(odd) : _mm512_setzero_si512();
    for (int half = 0; half < 2; ++half) {
      const auto index = (__m512i)(first + half * (L << 16 | L));
      _mm512_storeu_si512(dst + half * L, _mm512_permutex2var_epi16(low, index, high));
    }
    return;
  }
  const auto row = [&](const c10::BFloat16* src, int64_t j) {  // bits in the high half
    if (src == nullptr || n <= j) return Vector<uint32_t>{};
    return (Vector<uint32_t>)get(src + j, n - j);
  };
  for (int64_t j = 0; j < width; j += L) {
    store_vector<uint32_t>(dst + j, (row(even, j) >> 16) | row(odd, j));
  }
}

void pack_bf16(const c10::BFloat16* b, int64_t ld, int64_t n, int64_t K, int nv, void* panel) {
  const int64_t width = nv * VectorOf<float>::size;
  auto* out = static_cast<uint32_t*>(panel);
  for (int64_t k = 0; k < K; k += 2, out += width) {
    const c10::BFloat16* even = b + k * ld;
    prefetch_row(even, kPackRows * ld, n);
    prefetch_row(even, (kPackRows + 1) * ld, n);
    pack_pair(even, k + 1 < K ? even + ld : nullptr, n, width, out);
  }
}

void pack_rows_bf16(const c10::BFloat16* const* rows, int64_t column, int64_t n, int64_t K,
                    int64_t total, int nv, void* panel) {
  const int64_t width = nv * VectorOf<float>::size;
  auto* out = static_cast<uint32_t*>(panel);
  for (int64_t k = 0; k < K; k += 2, out += width) {
    for (int64_t next = k + kPackRows; next < k + kPackRows + 2 && next < total; ++next) {
      prefetch_row(rows[next], column, n);
    }
    pack_pair(rows[k] + column, k + 1 < K ? rows[k + 1] + column : nullptr, n, width, out);
  }
}

// Pairs (k, k + 1) of one column side by side.
void pack_left_bf16(const float* left, int64_t ld, int64_t n, int64_t K, void* packed) {
  using Bf16 = Lanes<c10::BFloat16>;
  auto* out = static_cast<uint32_t*>(packed);
  for (int64_t k = 0; k < K; k += 2, out += ld) {
    const float* even = left + k * ld;
    const float* odd = k + 1 < K ? even + ld : nullptr;
    for_each_vector<float>(n, [&](int64_t i, int64_t size) __attribute__((always_inline)) {
      const Vector<uint32_t> low = Bf16::round(get(even + i, size)) >> 16;
      const Vector<uint32_t> high = odd ? Bf16::round(get(odd + i, size)) & 0xFFFF0000u : low & 0u;
      put<float>((float*)(out + i), (Vector<float>)(low | high), size);
    });
  }
}
#endif
