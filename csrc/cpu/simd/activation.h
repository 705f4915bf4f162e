// Activations of the experts: every one is its argument times a factor.

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

// erf(x) to three units in the last place: x P(x^2) / Q(x^2) within [-4, 4], fitted by least squares
// of the relative error (2e-9), and beyond it the float nearest to the result.
inline Vector<float> error_function(Vector<float> x) {
  const Vector<float> bounded = x > 4.0f ? splat(4.0f) : (x < -4.0f ? splat(-4.0f) : x);
  const Vector<float> square = bounded * bounded;
  Vector<float> p = fma(square, splat(-1.320085236e-08f), splat(4.684482495e-06f));
  p = fma(p, square, splat(3.795998683e-04f));
  p = fma(p, square, splat(3.849670721e-03f));
  p = fma(p, square, splat(5.431696204e-02f));
  p = fma(p, square, splat(1.852054346e-01f));
  p = fma(p, square, splat(1.128379169e+00f));
  Vector<float> q = fma(square, splat(6.310780437e-05f), splat(1.307569881e-03f));
  q = fma(q, square, splat(1.546217718e-02f));
  q = fma(q, square, splat(1.139591157e-01f));
  q = fma(q, square, splat(4.974674565e-01f));
  q = fma(q, square, splat(1.0f));
  const Vector<float> inner = bounded * p / q;
  return x >= 4.0f ? splat(1.0f) : (x <= -4.0f ? splat(-1.0f) : inner);
}
inline Vector<double> error_function(Vector<double> x) {
  for (int i = 0; i < VectorOf<double>::size; ++i) x[i] = __builtin_erf(x[i]);
  return x;
}

// sqrt(8 / pi): (1 + tanh(x)) / 2 is sigmoid(2 x).
constexpr double kGeluTanh = 1.5957691216057308, kGeluCubic = 0.044715;

// f(x) / x.
template <ActKind kind, typename acc_t>
inline __attribute__((always_inline)) Vector<acc_t> factor(const Activation& form,
                                                           Vector<acc_t> x) {
  if constexpr (kind == ActKind::gelu) {
    return acc_t(0.5) * (1 + error_function(x * acc_t(0.70710678118654752)));
  } else if constexpr (kind == ActKind::gelu_tanh) {
    return sigmoid(acc_t(kGeluTanh) * x * (1 + acc_t(kGeluCubic) * x * x));
  } else if constexpr (kind == ActKind::relu_squared) {
    return x < 0 ? Vector<acc_t>{} : x;
  } else if constexpr (kind == ActKind::clamped_swiglu) {
    return sigmoid(acc_t(form.alpha) * x);
  } else {
    return sigmoid(x);
  }
}

// The derivative of x * factor.
template <ActKind kind, typename acc_t>
inline __attribute__((always_inline)) Vector<acc_t> slope(const Activation& form, Vector<acc_t> x,
                                                          Vector<acc_t> factor) {
  if constexpr (kind == ActKind::gelu) {
    return factor + x * exponential(acc_t(-0.5) * x * x) * acc_t(0.39894228040143268);
  } else if constexpr (kind == ActKind::gelu_tanh) {
    const Vector<acc_t> inner = acc_t(kGeluTanh) * x * (1 + acc_t(3 * kGeluCubic) * x * x);
    return factor * (1 + inner * (1 - factor));
  } else if constexpr (kind == ActKind::relu_squared) {
    return 2 * factor;
  } else if constexpr (kind == ActKind::clamped_swiglu) {
    return factor * (1 + acc_t(form.alpha) * x * (1 - factor));
  } else {
    return factor * (1 + x * (1 - factor));
  }
}

// The gate below its bound.
template <ActKind kind, typename acc_t>
inline __attribute__((always_inline)) Vector<acc_t> bounded_gate(const Activation& form,
                                                                 Vector<acc_t> gate) {
  if constexpr (kind != ActKind::clamped_swiglu) return gate;
  const Vector<acc_t> limit = Vector<acc_t>{} + acc_t(form.limit);
  return gate > limit ? limit : gate;
}

// What the gate's side is multiplied with.
template <ActKind kind, typename acc_t>
inline __attribute__((always_inline)) Vector<acc_t> bounded_up(const Activation& form,
                                                               Vector<acc_t> up) {
  if constexpr (kind != ActKind::clamped_swiglu) return up;
  const Vector<acc_t> limit = Vector<acc_t>{} + acc_t(form.limit);
  return (up > limit ? limit : (up < -limit ? -limit : up)) + acc_t(form.shift);
}

template <typename scalar_t, ActKind kind, bool gated>
void activate_as(const Activation& form, const acc_type<scalar_t>* gate,
                 const acc_type<scalar_t>* up, scalar_t* gate_out, scalar_t* up_out, scalar_t* act,
                 int64_t n) {
  using acc_t = acc_type<scalar_t>;
  for_each_vector<acc_t>(n, [&](int64_t i, int64_t left) __attribute__((always_inline)) {
    const Vector<acc_t> raw = rounded<scalar_t>(get(gate + i, left));
    if (gate_out) put<scalar_t>(gate_out + i, raw, left);
    const Vector<acc_t> g = bounded_gate<kind, acc_t>(form, raw);
    Vector<acc_t> a = g * factor<kind, acc_t>(form, g);
    if constexpr (gated) {
      const Vector<acc_t> u = rounded<scalar_t>(get(up + i, left));
      if (up_out) put<scalar_t>(up_out + i, u, left);
      a = a * bounded_up<kind, acc_t>(form, u);
    }
    put<scalar_t>(act + i, a, left);
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

template <typename scalar_t, ActKind kind, bool gated>
acc_type<scalar_t> activate_backward_as(const Activation& form, const acc_type<scalar_t>* dact,
                                        acc_type<scalar_t> weight, const scalar_t* gate,
                                        const scalar_t* up, scalar_t* dgate, scalar_t* dup,
                                        scalar_t* act, int64_t n) {
  using acc_t = acc_type<scalar_t>;
  const acc_t limit = acc_t(form.limit);
  Vector<acc_t> dot{};
  for_each_vector<acc_t>(n, [&](int64_t i, int64_t left) __attribute__((always_inline)) {
    const Vector<acc_t> d = get(dact + i, left), raw = get(gate + i, left);
    const Vector<acc_t> g = bounded_gate<kind, acc_t>(form, raw);
    const Vector<acc_t> s = factor<kind, acc_t>(form, g);
    Vector<acc_t> raw_up{}, u{}, a = g * s;
    if constexpr (gated) {
      raw_up = get(up + i, left);
      u = bounded_up<kind, acc_t>(form, raw_up);
      a = a * u;
    }
    a = rounded<scalar_t>(a);
    dot = fma(d, a, dot);
    if (act) put<scalar_t>(act + i, a, left);
    if (!dgate) return;
    const Vector<acc_t> wd = weight * d;
    const Vector<acc_t> towards_gate = gated ? wd * u : wd;
    Vector<acc_t> dg = towards_gate * slope<kind, acc_t>(form, g, s), du = wd * (g * s);
    if constexpr (kind == ActKind::clamped_swiglu) {
      dg = raw <= limit ? dg : Vector<acc_t>{};
      du = (raw_up <= limit) & (raw_up >= -limit) ? du : Vector<acc_t>{};
    }
    put<scalar_t>(dgate + i, dg, left);
    if constexpr (gated) put<scalar_t>(dup + i, du, left);
  });
  return sum_lanes<acc_t>(dot);
}

// Calls f with the kind, and whether there is a gate, as constants.
template <typename F>
inline auto with_form(const Activation& form, F f) {
  const auto of_kind = [&](auto kind) {
    return form.gated ? f(kind, std::true_type{}) : f(kind, std::false_type{});
  };
  switch (form.kind) {
    case ActKind::gelu:
      return of_kind(std::integral_constant<ActKind, ActKind::gelu>{});
    case ActKind::gelu_tanh:
      return of_kind(std::integral_constant<ActKind, ActKind::gelu_tanh>{});
    case ActKind::relu_squared:
      return of_kind(std::integral_constant<ActKind, ActKind::relu_squared>{});
    case ActKind::clamped_swiglu:
      return of_kind(std::integral_constant<ActKind, ActKind::clamped_swiglu>{});
    default:
      return of_kind(std::integral_constant<ActKind, ActKind::silu>{});
  }
}

template <typename scalar_t>
void activate(const Activation& form, const acc_type<scalar_t>* gate,
              const acc_type<scalar_t>* up, scalar_t* gate_out, scalar_t* up_out, scalar_t* act,
              int64_t n) {
  with_form(form, [&](auto kind, auto gated) {
    activate_as<scalar_t, kind(), gated()>(form, gate, up, gate_out, up_out, act, n);
  });
}

template <typename scalar_t>
acc_type<scalar_t> activate_backward(const Activation& form, const acc_type<scalar_t>* dact,
                                     acc_type<scalar_t> weight, const scalar_t* gate,
                                     const scalar_t* up, scalar_t* dgate, scalar_t* dup,
                                     scalar_t* act, int64_t n) {
  return with_form(form, [&](auto kind, auto gated) {
    return activate_backward_as<scalar_t, kind(), gated()>(form, dact, weight, gate, up, dgate,
                                                           dup, act, n);
  });
}
