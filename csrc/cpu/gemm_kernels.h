// The kernels themselves, written once with vector extensions. Each gemm_<level>.cpp sets the
// target, MOE_LEVEL (0 baseline, 1 AVX2, 2 AVX-512, 3 AVX-512 with bf16 dot products) and
// MOE_NAMESPACE, and includes this file last: nothing from a standard header may be compiled for
// the wider target, or the linker could pick that copy for a smaller machine.

#if MOE_LEVEL >= 2
#define MOE_VECTOR_BYTES 64
#define MOE_MAX_ROWS 12
#elif MOE_LEVEL == 1
#define MOE_VECTOR_BYTES 32
#define MOE_MAX_ROWS 6
#else
#define MOE_VECTOR_BYTES 16
#define MOE_MAX_ROWS 6
#endif

namespace moe_kernels::cpu::MOE_NAMESPACE {
namespace {

template <typename T>
struct VectorOf {
  static constexpr int size = MOE_VECTOR_BYTES / sizeof(T);
  typedef T type __attribute__((vector_size(MOE_VECTOR_BYTES)));
};
template <typename T>
using Vector = typename VectorOf<T>::type;

template <typename T>
inline Vector<T> load_vector(const void* p) {
  Vector<T> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

template <typename T>
inline void store_vector(void* p, Vector<T> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

// Explicit, because contraction is off: whether a chain is fused must not depend on how the
// compiler unrolled it.
inline Vector<float> fma(Vector<float> a, Vector<float> b, Vector<float> c) {
#if MOE_LEVEL >= 2
  return (Vector<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif MOE_LEVEL == 1
  return (Vector<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
inline Vector<double> fma(Vector<double> a, Vector<double> b, Vector<double> c) {
#if MOE_LEVEL >= 2
  return (Vector<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif MOE_LEVEL == 1
  return (Vector<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

// ---- conversions -------------------------------------------------------------------------------

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(c10::BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.x) << 16;
  float out;
  __builtin_memcpy(&out, &bits, sizeof(out));
  return out;
}

inline void narrow(float x, float* out) { *out = x; }
inline void narrow(double x, double* out) { *out = x; }
// Round to nearest even without a branch, so that loops over it vectorise.
inline void narrow(float x, c10::BFloat16* out) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t is_nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  out->x = static_cast<uint16_t>(is_nan ? 0x7FC0u : rounded);
}

template <typename scalar_t>
inline void load_scaled(const scalar_t* src, acc_type<scalar_t> scale, acc_type<scalar_t>* dst,
                        int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = scale * widen(src[i]);
}

template <typename scalar_t>
inline void store_scaled(const acc_type<scalar_t>* src, acc_type<scalar_t> scale, scalar_t* dst,
                         int64_t n) {
  for (int64_t i = 0; i < n; ++i) narrow(scale * src[i], dst + i);
}

// Half needs its own loops: the compiler does not vectorise the library's bit manipulation.
template <>
inline void load_scaled(const c10::Half* src, float scale, float* dst, int64_t n) {
  int64_t i = 0;
#if MOE_LEVEL >= 1
  for (; i + 8 <= n; i += 8) {
    const __m256 wide = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i)));
    _mm256_storeu_ps(dst + i, _mm256_mul_ps(_mm256_set1_ps(scale), wide));
  }
#endif
  for (; i < n; ++i) dst[i] = scale * c10::detail::fp16_ieee_to_fp32_value(src[i].x);
}

template <>
inline void store_scaled(const float* src, float scale, c10::Half* dst, int64_t n) {
  int64_t i = 0;
#if MOE_LEVEL >= 1
  for (; i + 8 <= n; i += 8) {
    const __m256 wide = _mm256_mul_ps(_mm256_set1_ps(scale), _mm256_loadu_ps(src + i));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + i),
                     _mm256_cvtps_ph(wide, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
#endif
  for (; i < n; ++i) dst[i].x = c10::detail::fp16_ieee_from_fp32_value(scale * src[i]);
}

// ---- packing -----------------------------------------------------------------------------------

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
    for (int64_t k = 0; k < count; k += L) {
      const int64_t size = count - k < L ? count - k : L;
      Vector<T> square[L];
      for (int j = 0; j < L; ++j) {
        const int64_t row = block * L + j;
        square[j] = row < n ? load(row, k, size) : Vector<T>{};
      }
      transpose_square<T>(square);
      for (int64_t i = 0; i < size; ++i) {
        store_vector<T>(panel + (k + i) * width + block * L, square[i]);
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
    if constexpr (std::is_same_v<scalar_t, acc_t>) {
      if (size == L) return load_vector<acc_t>(src);
    }
    acc_t wide[L] = {};
    load_scaled<scalar_t>(src, acc_t(1), wide, size);
    return load_vector<acc_t>(wide);
  };
  transpose_panel<acc_t>(load, n, K, nv, static_cast<acc_t*>(panel));
}

template <typename scalar_t>
inline void pack_one_row(const scalar_t* src, int64_t n, int64_t width, acc_type<scalar_t>* dst) {
  load_scaled<scalar_t>(src, acc_type<scalar_t>(1), dst, n);
  for (int64_t j = n; j < width; ++j) dst[j] = 0;
}

template <typename scalar_t>
void pack(const scalar_t* b, int64_t ld, int64_t n, int64_t K, int nv, void* panel) {
  using acc_t = acc_type<scalar_t>;
  const int64_t width = nv * VectorOf<acc_t>::size;
  auto* out = static_cast<acc_t*>(panel);
  for (int64_t k = 0; k < K; ++k) pack_one_row(b + k * ld, n, width, out + k * width);
}

template <typename scalar_t>
void pack_rows(const scalar_t* const* rows, int64_t column, int64_t n, int64_t K, int nv,
               acc_type<scalar_t>* panel) {
  const int64_t width = nv * VectorOf<acc_type<scalar_t>>::size;
  for (int64_t k = 0; k < K; ++k) pack_one_row(rows[k] + column, n, width, panel + k * width);
}

// ---- products ----------------------------------------------------------------------------------

// Steps of k summed in one chain: long chains lose accuracy with the square root of their length.
// Even, for the pairs of bf16.
constexpr int64_t kChain = 256;

// Operand A as the products read it: one pointer per row, or k-major.
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

// Calls f(std::integral_constant<int, m>) for 1 <= m <= MOE_MAX_ROWS.
template <typename F, int MR = MOE_MAX_ROWS>
inline void with_rows(int m, F f) {
  if constexpr (MR > 0) {
    if (m == MR) return f(std::integral_constant<int, MR>{});
    with_rows<F, MR - 1>(m, f);
  }
}

template <typename acc_t, typename Operand>
void multiply_panels(Operand operand, int m, int64_t K, const acc_t* panels, int num_panels,
                     int nv, acc_t* c, int64_t ldc, bool accumulate) {
  const int64_t width = nv * VectorOf<acc_t>::size;
  with_rows(m, [&](auto rows) {
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
  const bool copy = !std::is_same_v<scalar_t, acc_t> || (num_panels > 1 && K >= 256);
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
void tile_kmajor(int m, int64_t K, const acc_t* a, int64_t lda, const acc_t* panels,
                 int num_panels, int nv, acc_t* c, int64_t ldc) {
  multiply_panels<acc_t>(KMajorOperand<acc_t>{a, lda}, m, K, panels, num_panels, nv, c, ldc, true);
}

// ---- bf16 dot products -------------------------------------------------------------------------

#if MOE_LEVEL >= 3
// Panels hold pairs (k, k + 1) side by side, as vdpbf16ps reads them.
void pack_transposed_bf16(const c10::BFloat16* w, int64_t ld, int64_t n, int64_t K, int nv,
                          void* panel) {
  constexpr int L = VectorOf<int32_t>::size;
  const auto load = [&](int64_t row, int64_t pair, int64_t size) {
    const c10::BFloat16* src = w + row * ld + 2 * pair;
    if (size == L && 2 * (pair + L) <= K) return load_vector<int32_t>(src);
    uint16_t padded[2 * L] = {};
    const int64_t left = K - 2 * pair;
    __builtin_memcpy(padded, src, 2 * (left < 2 * size ? left : 2 * size));
    return load_vector<int32_t>(padded);
  };
  transpose_panel<int32_t>(load, n, (K + 1) / 2, nv, static_cast<int32_t*>(panel));
}

void pack_bf16(const c10::BFloat16* b, int64_t ld, int64_t n, int64_t K, int nv, void* panel) {
  const int64_t width = nv * VectorOf<float>::size;
  auto* out = static_cast<uint32_t*>(panel);
  for (int64_t k = 0; k < K; k += 2, out += width) {
    const c10::BFloat16* even = b + k * ld;
    const c10::BFloat16* odd = even + ld;
    const bool has_odd = k + 1 < K;
    for (int64_t j = 0; j < n; ++j) out[j] = even[j].x;
    if (has_odd) {
      for (int64_t j = 0; j < n; ++j) out[j] |= static_cast<uint32_t>(odd[j].x) << 16;
    }
    for (int64_t j = n; j < width; ++j) out[j] = 0;
  }
}

template <int NV>
inline void load_pairs(const uint32_t* panel, __m512bh* b) {
#pragma GCC unroll 2
  for (int j = 0; j < NV; ++j) b[j] = (__m512bh)_mm512_loadu_si512(panel + j * 16);
}

template <int MR, int NV>
inline void multiply_chain_bf16(const c10::BFloat16* const* rows, int64_t begin, int64_t end,
                                const uint32_t* panel, Registers<float, MR, NV>& reg) {
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
    step(pair, [&](int i) {
      int32_t both;
      __builtin_memcpy(&both, rows[i] + 2 * pair, sizeof(both));
      return both;
    });
  }
  if (end % 2) step(end / 2, [&](int i) { return static_cast<int32_t>(rows[i][end - 1].x); });
}

template <int MR, int NV>
void multiply_bf16(const c10::BFloat16* const* rows, int64_t K, const uint32_t* panel, float* c,
                   int64_t ldc, bool accumulate) {
  for_each_chain(K, [&](int64_t begin, int64_t end) {
    Registers<float, MR, NV> reg;
    reg.clear();
    multiply_chain_bf16<MR, NV>(rows, begin, end, panel, reg);
    reg.write(c, ldc, accumulate || begin > 0);
  });
}

void tile_bf16(int m, int64_t K, const c10::BFloat16* const* rows, const void* panels,
               int num_panels, int nv, float* c, int64_t ldc, bool accumulate, float*) {
  const int64_t width = nv * VectorOf<float>::size;
  const int64_t stride = (K + 1) / 2 * width;
  with_rows(m, [&](auto count) {
    for (int p = 0; p < num_panels; ++p) {
      const uint32_t* panel = static_cast<const uint32_t*>(panels) + p * stride;
      if (nv == 2) {
        multiply_bf16<count(), 2>(rows, K, panel, c + p * width, ldc, accumulate);
      } else {
        multiply_bf16<count(), 1>(rows, K, panel, c + p * width, ldc, accumulate);
      }
    }
  });
}
#endif

// ---- elementwise -------------------------------------------------------------------------------

template <typename acc_t>
void axpy(const acc_t* src, acc_t scale, acc_t* dst, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] += scale * src[i];
}

// exp(x) to about one unit in the last place, without a branch or a call so that it vectorises.
// Clamped where float would overflow or go subnormal; NaN stays NaN. So sigmoid(x) stays at 6e-39
// below x = -88, and silu there is x times that (-6e-37 at -100) instead of zero: harmless, because
// it is summed with activations of ordinary size, which it cannot change.
inline float exponential(float x) {
  x = x > 88.0f ? 88.0f : x;
  x = x < -87.0f ? -87.0f : x;
  const float round = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float n = (x * 1.44269504088896341f + round) - round;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  __builtin_memcpy(&power, &bits, sizeof(power));
  return p * power;
}
inline double exponential(double x) { return __builtin_exp(x); }

template <typename acc_t>
inline acc_t sigmoid(acc_t x) {
  return acc_t(1) / (acc_t(1) + exponential(-x));
}

// Elements handled at once: whole blocks, padded, so that no element takes a scalar tail.
constexpr int kBlock = 32;

template <typename scalar_t>
inline void load_block(const scalar_t* src, int64_t n, acc_type<scalar_t>* dst) {
  load_scaled<scalar_t>(src, acc_type<scalar_t>(1), dst, n);
  for (int64_t i = n; i < kBlock; ++i) dst[i] = 0;
}

template <typename acc_t>
inline void activate_block(const acc_t* gate, const acc_t* up, acc_t* act) {
  for (int i = 0; i < kBlock; ++i) act[i] = gate[i] * sigmoid(gate[i]) * up[i];
}

template <typename scalar_t>
void swiglu(const acc_type<scalar_t>* gate, const acc_type<scalar_t>* up, scalar_t* gate_out,
            scalar_t* up_out, scalar_t* act, int64_t n) {
  using acc_t = acc_type<scalar_t>;
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t size = n - i < kBlock ? n - i : kBlock;
    scalar_t gate_rounded[kBlock], up_rounded[kBlock];
    store_scaled<scalar_t>(gate + i, acc_t(1), gate_rounded, size);
    store_scaled<scalar_t>(up + i, acc_t(1), up_rounded, size);
    for (int64_t j = 0; gate_out && j < size; ++j) gate_out[i + j] = gate_rounded[j];
    for (int64_t j = 0; up_out && j < size; ++j) up_out[i + j] = up_rounded[j];
    acc_t g[kBlock], u[kBlock], a[kBlock];
    load_block(gate_rounded, size, g);
    load_block(up_rounded, size, u);
    activate_block(g, u, a);
    store_scaled<scalar_t>(a, acc_t(1), act + i, size);
  }
}

// d(act), gate and up of one block in; d(gate) and d(up) out, in place of gate and up.
template <typename acc_t>
inline void swiglu_backward_block(const acc_t* dact, acc_t weight, acc_t* gate, acc_t* up) {
  for (int i = 0; i < kBlock; ++i) {
    const acc_t s = sigmoid(gate[i]);
    const acc_t d = weight * dact[i];
    const acc_t dgate = d * up[i] * (s * (acc_t(1) + gate[i] * (acc_t(1) - s)));
    const acc_t dup = d * (gate[i] * s);
    gate[i] = dgate;
    up[i] = dup;
  }
}

// Adds by halves: a fixed order that vectorises.
template <typename acc_t>
inline acc_t dot_block(const acc_t* a, const acc_t* b) {
  acc_t products[kBlock];
  for (int i = 0; i < kBlock; ++i) products[i] = a[i] * b[i];
#pragma GCC unroll 8
  for (int half = kBlock / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) products[i] += products[i + half];
  }
  return products[0];
}

template <typename scalar_t>
acc_type<scalar_t> swiglu_backward(const acc_type<scalar_t>* dact, acc_type<scalar_t> weight,
                                   const scalar_t* gate, const scalar_t* up, scalar_t* dgate,
                                   scalar_t* dup, int64_t n) {
  using acc_t = acc_type<scalar_t>;
  acc_t dot = 0;
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t size = n - i < kBlock ? n - i : kBlock;
    acc_t d[kBlock], g[kBlock], u[kBlock], a[kBlock];
    scalar_t rounded[kBlock];
    load_block(dact + i, size, d);
    load_block(gate + i, size, g);
    load_block(up + i, size, u);
    activate_block(g, u, a);
    store_scaled<scalar_t>(a, acc_t(1), rounded, kBlock);
    load_scaled<scalar_t>(rounded, acc_t(1), a, kBlock);
    dot += dot_block(d, a);
    if (!dgate) continue;
    swiglu_backward_block(d, weight, g, u);
    store_scaled<scalar_t>(g, acc_t(1), dgate + i, size);
    store_scaled<scalar_t>(u, acc_t(1), dup + i, size);
  }
  return dot;
}

template <typename scalar_t>
constexpr Kernels<scalar_t> generic_table() {
  using acc_t = acc_type<scalar_t>;
  Kernels<scalar_t> table{};
  table.max_rows = MOE_MAX_ROWS;
  table.vector = VectorOf<acc_t>::size;
  table.k_multiple = 1;
  table.element_bytes = sizeof(acc_t);
  table.pack_transposed = &pack_transposed<scalar_t>;
  table.pack = &pack<scalar_t>;
  table.pack_rows = &pack_rows<scalar_t>;
  table.tile = &tile<scalar_t>;
  table.tile_kmajor = &tile_kmajor<acc_t>;
  table.store = &store_scaled<scalar_t>;
  table.load = &load_scaled<scalar_t>;
  table.axpy = &axpy<acc_t>;
  table.swiglu = &swiglu<scalar_t>;
  table.swiglu_backward = &swiglu_backward<scalar_t>;
  return table;
}

constexpr Kernels<c10::BFloat16> bf16_table() {
  Kernels<c10::BFloat16> table = generic_table<c10::BFloat16>();
#if MOE_LEVEL >= 3
  table.k_multiple = 2;
  table.element_bytes = sizeof(c10::BFloat16);
  table.pack_transposed = &pack_transposed_bf16;
  table.pack = &pack_bf16;
  table.tile = &tile_bf16;
#endif
  return table;
}

}  // namespace

extern const KernelTables tables;
constexpr KernelTables tables = {generic_table<float>(), generic_table<double>(), bf16_table(),
                                 generic_table<c10::Half>()};

}  // namespace moe_kernels::cpu::MOE_NAMESPACE
