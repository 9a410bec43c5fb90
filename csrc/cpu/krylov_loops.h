// Inner loops of the Krylov verbs on one chunk of a vector. No include guard and no includes: krylov_cpu.cpp includes
// this file once per instruction set and real type, inside a target region, with `real` defined. Raw pointers only.
//
//   vec  64 bytes of reals, the same logical vector on every instruction set (one zmm, two ymm or four xmm registers),
//   so
//        that sums are formed in the same order everywhere; only the rounding of a fused multiply-add differs.
//
// Complex vectors come here as reals (re, im interleaved): see Chunk in krylov_cpu.cpp.

typedef real vec __attribute__((vector_size(64), aligned(sizeof(real)), may_alias));
enum { kLanes = 64 / sizeof(real) };

static inline vec load(const real* p) { return *(const vec*)p; }
static inline void store(real* p, vec v) { *(vec*)p = v; }

static inline double sum(vec v) {
  double s[4] = {0, 0, 0, 0};
  for (int i = 0; i < kLanes; i += 4)
    for (int l = 0; l < 4; ++l) s[l] += v[i + l];
  return (s[0] + s[1]) + (s[2] + s[3]);
}

// out[j] = Σ_i V[j][i] w[i]: four basis vectors at a time share the loads of w.
static void dots(const real* const* V, int64_t k, int64_t at, const real* w, int64_t n, double* out) {
  const int64_t whole = n - n % kLanes;
  int64_t j = 0;
  for (; j + 4 <= k; j += 4) {
    const real *a = V[j] + at, *b = V[j + 1] + at, *c = V[j + 2] + at, *d = V[j + 3] + at;
    vec sa = {}, sb = {}, sc = {}, sd = {};
    for (int64_t i = 0; i < whole; i += kLanes) {
      const vec x = load(w + i);
      sa += load(a + i) * x, sb += load(b + i) * x, sc += load(c + i) * x, sd += load(d + i) * x;
    }
    double ta = 0, tb = 0, tc = 0, td = 0;
    for (int64_t i = whole; i < n; ++i)
      ta += (double)a[i] * w[i], tb += (double)b[i] * w[i], tc += (double)c[i] * w[i], td += (double)d[i] * w[i];
    out[j] = sum(sa) + ta, out[j + 1] = sum(sb) + tb, out[j + 2] = sum(sc) + tc, out[j + 3] = sum(sd) + td;
  }
  for (; j < k; ++j) {
    const real* a = V[j] + at;
    vec sa = {};
    double ta = 0;
    for (int64_t i = 0; i < whole; i += kLanes) sa += load(a + i) * load(w + i);
    for (int64_t i = whole; i < n; ++i) ta += (double)a[i] * w[i];
    out[j] = sum(sa) + ta;
  }
}

// w ← w − Σ_j h[j] V[j]: four basis vectors at a time share the pass over w, which stays in the L1 cache.
static void update(const real* const* V, int64_t k, int64_t at, const double* h, real* w, int64_t n) {
  const int64_t whole = n - n % kLanes;
  int64_t j = 0;
  for (; j + 4 <= k; j += 4) {
    const real *a = V[j] + at, *b = V[j + 1] + at, *c = V[j + 2] + at, *d = V[j + 3] + at;
    const real ha = (real)h[j], hb = (real)h[j + 1], hc = (real)h[j + 2], hd = (real)h[j + 3];
    for (int64_t i = 0; i < whole; i += kLanes)
      store(w + i, load(w + i) - ha * load(a + i) - hb * load(b + i) - hc * load(c + i) - hd * load(d + i));
    for (int64_t i = whole; i < n; ++i) w[i] = w[i] - ha * a[i] - hb * b[i] - hc * c[i] - hd * d[i];
  }
  for (; j < k; ++j) {
    const real *a = V[j] + at, ha = (real)h[j];
    for (int64_t i = 0; i < whole; i += kLanes) store(w + i, load(w + i) - ha * load(a + i));
    for (int64_t i = whole; i < n; ++i) w[i] = w[i] - ha * a[i];
  }
}

// y ← factor · x; x and y may be the same.
static void scale(const real* x, real factor, real* y, int64_t n) {
  const int64_t whole = n - n % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) store(y + i, factor * load(x + i));
  for (int64_t i = whole; i < n; ++i) y[i] = factor * x[i];
}

// max |x_i|; a NaN is passed over here and caught by the norm.
static real amax(const real* x, int64_t n) {
  const int64_t whole = n - n % kLanes;
  vec m = {};
  for (int64_t i = 0; i < whole; i += kLanes) {
    const vec v = load(x + i), a = v < 0 ? -v : v;
    m = a > m ? a : m;
  }
  real most = 0;
  for (int l = 0; l < kLanes; ++l) most = m[l] > most ? m[l] : most;
  for (int64_t i = whole; i < n; ++i) {
    const real a = x[i] < 0 ? -x[i] : x[i];
    most = a > most ? a : most;
  }
  return most;
}
