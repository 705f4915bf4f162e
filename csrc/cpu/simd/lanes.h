// Vectors, and the conversion of each stored type to and from them.

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

// Prefetches what lies `elements` further, which may be beyond the array, into the second-level
// cache.
template <typename T>
inline void prefetch(const T* p, int64_t elements) {
  const auto address = reinterpret_cast<uintptr_t>(p) + static_cast<uintptr_t>(elements) * sizeof(T);
  __builtin_prefetch(reinterpret_cast<const void*>(address), 0, 2);
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

// One vector's worth of stored elements: `type` holds them as stored.
template <typename scalar_t>
struct Lanes {  // float and double are computed with as they are stored
  using type = Vector<scalar_t>;
  static inline Vector<scalar_t> widen(type x) { return x; }
  static inline type narrow(Vector<scalar_t> x) { return x; }
};

template <>
struct Lanes<c10::BFloat16> {
  typedef uint16_t type __attribute__((vector_size(MOE_VECTOR_BYTES / 2)));
  static inline Vector<float> widen(type x) {
#if MOE_LEVEL >= 2
    const auto wide = (Vector<uint32_t>)_mm512_cvtepu16_epi32((__m256i)x);
#else
    const auto wide = __builtin_convertvector(x, Vector<uint32_t>);
#endif
    return (Vector<float>)(wide << 16);
  }
  // To nearest even, as everywhere in torch; in the upper half of each element.
  static inline Vector<uint32_t> round(Vector<float> x) {
    const auto bits = (Vector<uint32_t>)x;
    const Vector<uint32_t> rounded = bits + 0x7FFFu + ((bits >> 16) & 1u);
    return (bits & 0x7FFFFFFFu) > 0x7F800000u ? Vector<uint32_t>{} + 0x7FC00000u : rounded;
  }
  static inline type narrow(Vector<float> x) {
    const Vector<uint32_t> bits = round(x) >> 16;
#if MOE_LEVEL >= 2
    return (type)_mm512_cvtepi32_epi16((__m512i)bits);
#else
    return __builtin_convertvector(bits, type);
#endif
  }
};

template <>
struct Lanes<c10::Half> {
  typedef uint16_t type __attribute__((vector_size(MOE_VECTOR_BYTES / 2)));
#if MOE_LEVEL >= 2
  static inline Vector<float> widen(type x) { return (Vector<float>)_mm512_cvtph_ps((__m256i)x); }
  static inline type narrow(Vector<float> x) {
    return (type)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
#elif MOE_LEVEL == 1
  static inline Vector<float> widen(type x) { return (Vector<float>)_mm256_cvtph_ps((__m128i)x); }
  static inline type narrow(Vector<float> x) {
    return (type)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
#else
  static inline Vector<float> widen(type x) {
    Vector<float> wide;
    for (int i = 0; i < VectorOf<float>::size; ++i) {
      wide[i] = c10::detail::fp16_ieee_to_fp32_value(x[i]);
    }
    return wide;
  }
  static inline type narrow(Vector<float> x) {
    type half;
    for (int i = 0; i < VectorOf<float>::size; ++i) {
      half[i] = c10::detail::fp16_ieee_from_fp32_value(x[i]);
    }
    return half;
  }
#endif
};

// Returns x as it is after being stored and read again.
template <typename scalar_t>
inline Vector<acc_type<scalar_t>> rounded(Vector<acc_type<scalar_t>> x) {
  if constexpr (std::is_same_v<scalar_t, c10::BFloat16>) {
    return (Vector<float>)(Lanes<scalar_t>::round(x) & 0xFFFF0000u);
  } else {
    return Lanes<scalar_t>::widen(Lanes<scalar_t>::narrow(x));
  }
}

// Calls f(i, left) for every vector of acc_t in [0, n); only the last may have left < its size.
template <typename acc_t, typename F>
inline __attribute__((always_inline)) void for_each_vector(int64_t n, F f) {
  constexpr int64_t L = VectorOf<acc_t>::size;
  int64_t i = 0;
  for (; i + L <= n; i += L) f(i, L);
  if (i < n) f(i, n - i);
}

// The first min(left, L) elements, zeros beyond. Every element takes the same path whether its
// vector is whole or not.
template <typename scalar_t>
inline __attribute__((always_inline)) Vector<acc_type<scalar_t>> get(const scalar_t* src, int64_t left) {
  constexpr int L = VectorOf<acc_type<scalar_t>>::size;
  typename Lanes<scalar_t>::type lanes{};
  if (left >= L) {
    __builtin_memcpy(&lanes, src, sizeof(lanes));
  } else {
    __builtin_memcpy(&lanes, src, left * sizeof(scalar_t));
  }
  return Lanes<scalar_t>::widen(lanes);
}

template <typename scalar_t>
inline __attribute__((always_inline)) void put(scalar_t* dst, Vector<acc_type<scalar_t>> x, int64_t left) {
  constexpr int L = VectorOf<acc_type<scalar_t>>::size;
  const typename Lanes<scalar_t>::type lanes = Lanes<scalar_t>::narrow(x);
  if (left >= L) {
    __builtin_memcpy(dst, &lanes, sizeof(lanes));
  } else {
    __builtin_memcpy(dst, &lanes, left * sizeof(scalar_t));
  }
}

template <typename scalar_t>
void load_scaled(const scalar_t* src, acc_type<scalar_t> scale, acc_type<scalar_t>* dst,
                 int64_t n) {
  using acc_t = acc_type<scalar_t>;
  for_each_vector<acc_t>(n, [&](int64_t i, int64_t left) __attribute__((always_inline)) {
    put<acc_t>(dst + i, scale * get(src + i, left), left);
  });
}

template <typename scalar_t>
void store_scaled(const acc_type<scalar_t>* src, acc_type<scalar_t> scale, scalar_t* dst,
                  int64_t n) {
  for_each_vector<acc_type<scalar_t>>(n, [&](int64_t i, int64_t left)
                                             __attribute__((always_inline)) {
    put<scalar_t>(dst + i, scale * get(src + i, left), left);
  });
}
