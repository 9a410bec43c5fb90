// One row of a convolution with stride 1, float64. For each_isa.inl.
//   out[x] = Σ_t w[t] · in[at[t] + x],  0 ≤ x < n
// The sums of up to four registers stay in registers over all taps.

typedef double word __attribute__((vector_size(kWordBytes), aligned(sizeof(double)), may_alias));
enum { kLanes = kWordBytes / sizeof(double) };

template <int words>
static inline void stencil_block(const double* in, const int64_t* at, const double* w, int64_t taps, double* out) {
  word sum[words] = {};
  for (int64_t t = 0; t < taps; ++t)
    for (int i = 0; i < words; ++i) sum[i] += w[t] * *(const word*)(in + at[t] + i * kLanes);
  for (int i = 0; i < words; ++i) *(word*)(out + i * kLanes) = sum[i];
}

static void stencil_row(const double* in, const int64_t* at, const double* w, int64_t taps, double* out, int64_t n) {
  int64_t x = 0;
  for (; x + 4 * kLanes <= n; x += 4 * kLanes) stencil_block<4>(in + x, at, w, taps, out + x);
  for (; x + 2 * kLanes <= n; x += 2 * kLanes) stencil_block<2>(in + x, at, w, taps, out + x);
  for (; x + kLanes <= n; x += kLanes) stencil_block<1>(in + x, at, w, taps, out + x);
  for (; x < n; ++x) {
    double sum = 0;
    for (int64_t t = 0; t < taps; ++t) sum += w[t] * in[at[t] + x];
    out[x] = sum;
  }
}
