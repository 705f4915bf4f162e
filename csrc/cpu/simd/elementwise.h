// Elementwise work between the products, a row at a time.

// dst[i] += scale[i] * row i of c, for m rows of n elements.
template <typename acc_t>
void add_rows(int m, int64_t n, const acc_t* c, int64_t ldc, const acc_t* scale,
              acc_t* const* dst) {
  for (int i = 0; i < m; ++i) {
    for_each_vector<acc_t>(n, [&](int64_t j, int64_t left) __attribute__((always_inline)) {
      const Vector<acc_t> sum = get(dst[i] + j, left) + scale[i] * get(c + i * ldc + j, left);
      put<acc_t>(dst[i] + j, sum, left);
    });
  }
}

inline Vector<float> splat(float x) { return x - Vector<float>{}; }

// exp(x) to about one unit in the last place. Clamped where float would overflow or go subnormal;
// NaN stays NaN. So sigmoid(x) stays at 6e-39 below x = -88, and silu there is x times that
// (-6e-37 at -100) instead of zero: harmless for gates above -1e30, whose silu stays below 1e-8, and
// no activation of a working model is as large as that.
inline Vector<float> exponential(Vector<float> x) {
  x = x > 88.0f ? splat(88.0f) : x;
  x = x < -87.0f ? splat(-87.0f) : x;
  const float round = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vector<float> n = (x * 1.44269504088896341f + round) - round;
  Vector<float> r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  Vector<float> p = fma(r, splat(1.9875691500e-4f), splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r + 1.0f);
  const Vector<int32_t> exponent = __builtin_convertvector(n, Vector<int32_t>);
  return p * (Vector<float>)((exponent + 127) << 23);
}
inline Vector<double> exponential(Vector<double> x) {
  for (int i = 0; i < VectorOf<double>::size; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

template <typename V>
inline V sigmoid(V x) {
  return 1 / (1 + exponential(-x));
}

template <typename scalar_t>
void swiglu(const acc_type<scalar_t>* gate, const acc_type<scalar_t>* up, scalar_t* gate_out,
            scalar_t* up_out, scalar_t* act, int64_t n) {
  using acc_t = acc_type<scalar_t>;
  for_each_vector<acc_t>(n, [&](int64_t i, int64_t left) __attribute__((always_inline)) {
    const Vector<acc_t> g = rounded<scalar_t>(get(gate + i, left));
    const Vector<acc_t> u = rounded<scalar_t>(get(up + i, left));
    if (gate_out) put<scalar_t>(gate_out + i, g, left);
    if (up_out) put<scalar_t>(up_out + i, u, left);
    put<scalar_t>(act + i, g * sigmoid(g) * u, left);
  });
}

// Adds by halves, in a fixed order.
template <typename acc_t>
inline acc_t sum_lanes(Vector<acc_t> x) {
  acc_t lanes[VectorOf<acc_t>::size];
  store_vector<acc_t>(lanes, x);
#pragma GCC unroll 8
  for (int half = VectorOf<acc_t>::size / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

template <typename scalar_t>
acc_type<scalar_t> swiglu_backward(const acc_type<scalar_t>* dact, acc_type<scalar_t> weight,
                                   const scalar_t* gate, const scalar_t* up, scalar_t* dgate,
                                   scalar_t* dup, scalar_t* act, int64_t n) {
  using acc_t = acc_type<scalar_t>;
  Vector<acc_t> dot{};
  for_each_vector<acc_t>(n, [&](int64_t i, int64_t left) __attribute__((always_inline)) {
    const Vector<acc_t> d = get(dact + i, left);
    const Vector<acc_t> g = get(gate + i, left), u = get(up + i, left);
    const Vector<acc_t> s = sigmoid(g);
    const Vector<acc_t> a = rounded<scalar_t>(g * s * u);
    dot = fma(d, a, dot);
    if (act) put<scalar_t>(act + i, a, left);
    if (!dgate) return;
    const Vector<acc_t> wd = weight * d;
    put<scalar_t>(dgate + i, wd * u * (s * (1 + g * (1 - s))), left);
    put<scalar_t>(dup + i, wd * (g * s), left);
  });
  return sum_lanes<acc_t>(dot);
}
