// Unpacks frozen weights, whose formats moe_kernels/ops/moe_mlp/packed.py describes. A value is a
// product in float, rounded once to scalar_t.

constexpr float kNf4[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

// The first min(left, L) values of codes, two a byte, the first in the high half.
inline Vector<float> nf4_values(const uint8_t* codes, int64_t left) {
  constexpr int L = VectorOf<float>::size;
#if MOE_LEVEL >= 2
  if (left >= L) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes));
    const __m128i mask = _mm_set1_epi8(15);
    const __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask);
    const __m128i pairs = _mm_unpacklo_epi8(high, _mm_and_si128(bytes, mask));
    return (Vector<float>)_mm512_permutexvar_ps(_mm512_cvtepu8_epi32(pairs), _mm512_loadu_ps(kNf4));
  }
#endif
  Vector<float> values{};
  for (int i = 0; i < L && i < left; ++i) {
    values[i] = kNf4[i % 2 ? codes[i / 2] & 15 : codes[i / 2] >> 4];
  }
  return values;
}

// The first min(left, L) values of float8_e4m3fn.
inline Vector<float> fp8_values(const uint8_t* stored, int64_t left) {
  constexpr int L = VectorOf<float>::size;
  typedef uint8_t Bytes __attribute__((vector_size(L)));
  Bytes bytes{};
  __builtin_memcpy(&bytes, stored, left < L ? left : L);
#if MOE_LEVEL >= 2
  const auto wide = (Vector<uint32_t>)_mm512_cvtepu8_epi32((__m128i)bytes);
#else
  const auto wide = __builtin_convertvector(bytes, Vector<uint32_t>);
#endif
  const Vector<uint32_t> magnitude = wide & 0x7Fu;
  const Vector<uint32_t> normal = (magnitude << 20) + (120u << 23);
  // Computed from an integer, because float's own subnormal numbers may be flushed to zero.
  const Vector<float> small = __builtin_convertvector((Vector<int32_t>)magnitude, Vector<float>);
  const auto subnormal = (Vector<uint32_t>)(small * 0x1p-9f);
  Vector<uint32_t> bits = magnitude < 8u ? subnormal : normal;
  bits = magnitude == 0x7Fu ? Vector<uint32_t>{} + 0x7FC00000u : bits;
  return (Vector<float>)(bits | (wide & 0x80u) << 24);
}

template <typename scalar_t>
inline void put_floats(scalar_t* dst, Vector<float> values, int64_t left) {
  if constexpr (std::is_same_v<scalar_t, double>) {
    constexpr int L = VectorOf<float>::size;
    for (int i = 0; i < L && i < left; ++i) dst[i] = values[i];
  } else {
    put<scalar_t>(dst, values, left);
  }
}

template <typename scalar_t>
void unpack_nf4(const uint8_t* codes, float scale, scalar_t* dst, int64_t n) {
  for_each_vector<float>(n, [&](int64_t i, int64_t left) __attribute__((always_inline)) {
    put_floats(dst + i, scale * nf4_values(codes + i / 2, left), left);
  });
}

template <typename scalar_t>
void unpack_fp8(const uint8_t* stored, float scale, scalar_t* dst, int64_t n) {
  for_each_vector<float>(n, [&](int64_t i, int64_t left) __attribute__((always_inline)) {
    put_floats(dst + i, scale * fp8_values(stored + i, left), left);
  });
}
