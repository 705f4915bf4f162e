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

template <typename scalar_t>
void add(const scalar_t* src, acc_type<scalar_t>* dst, int64_t n) {
  using acc_t = acc_type<scalar_t>;
  for_each_vector<acc_t>(n, [&](int64_t i, int64_t left) __attribute__((always_inline)) {
    put<acc_t>(dst + i, get(dst + i, left) + get(src + i, left), left);
  });
}
