// Inner loops of the Krylov verbs on one chunk of a vector. For each_isa.inl, once per
// instruction set and real type, with `real` and kWordBytes (one register) defined.
//
//   vec  64 bytes of reals, the same logical vector on every instruction set (one zmm, two ymm or four xmm registers),
//   so
//        that sums are formed in the same order everywhere; only the rounding of a fused multiply-add differs.
//
// Complex vectors come here as reals (re, im interleaved): see chunk_dots in krylov_cpu.cpp.

typedef real word __attribute__((vector_size(kWordBytes), aligned(sizeof(real)), may_alias));
typedef real quad __attribute__((vector_size(16)));
enum { kParts = 64 / kWordBytes, kWord = kWordBytes / sizeof(real), kLanes = 64 / sizeof(real) };
struct vec {
  word part[kParts];
};

static inline vec load(const real* p) {
  vec v;
  for (int i = 0; i < kParts; ++i) v.part[i] = *(const word*)(p + i * kWord);
  return v;
}
static inline void store(real* p, vec v) {
  for (int i = 0; i < kParts; ++i) *(word*)(p + i * kWord) = v.part[i];
}
static inline vec add_product(vec s, vec x, vec y) {  // s + x y
  for (int i = 0; i < kParts; ++i) s.part[i] += x.part[i] * y.part[i];
  return s;
}
static inline vec subtract_multiple(vec w, real h, vec v) {  // w − h v
  for (int i = 0; i < kParts; ++i) w.part[i] -= h * v.part[i];
  return w;
}
static inline double sum(vec v) {
  quad q[4];
  __builtin_memcpy(q, &v, sizeof v);
  q[0] = (q[0] + q[2]) + (q[1] + q[3]);
  double s = 0;
  for (unsigned l = 0; l < 16 / sizeof(real); ++l) s += q[0][l];
  return s;
}

// Asks for 64 bytes of each of the four basis vectors behind the four in use: chunks are too short for the hardware to
// see the next vector coming.
static inline void prefetch_four(const real* const* next, int64_t at) {
  for (int v = 0; v < 4; ++v) __builtin_prefetch(next[v] + at);
}

// out[j] = Σ_i V[j][i] w[i]: four basis vectors at a time share the loads of w.
static void dots(const real* const* V, int64_t k, int64_t at, const real* w, int64_t n, double* out) {
  const int64_t whole = n - n % kLanes;
  int64_t j = 0;
  for (; j + 4 <= k; j += 4) {
    const real *a = V[j] + at, *b = V[j + 1] + at, *c = V[j + 2] + at, *d = V[j + 3] + at;
    const real* const* next = V + (j + 8 <= k ? j + 4 : j);
    vec sa = {}, sb = {}, sc = {}, sd = {};
    for (int64_t i = 0; i < whole; i += kLanes) {
      prefetch_four(next, at + i);
      const vec x = load(w + i);
      sa = add_product(sa, load(a + i), x), sb = add_product(sb, load(b + i), x);
      sc = add_product(sc, load(c + i), x), sd = add_product(sd, load(d + i), x);
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
    for (int64_t i = 0; i < whole; i += kLanes) sa = add_product(sa, load(a + i), load(w + i));
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
    const real* const* next = V + (j + 8 <= k ? j + 4 : j);
    for (int64_t i = 0; i < whole; i += kLanes) {
      prefetch_four(next, at + i);
      vec x = subtract_multiple(subtract_multiple(load(w + i), ha, load(a + i)), hb, load(b + i));
      store(w + i, subtract_multiple(subtract_multiple(x, hc, load(c + i)), hd, load(d + i)));
    }
    for (int64_t i = whole; i < n; ++i) w[i] = w[i] - ha * a[i] - hb * b[i] - hc * c[i] - hd * d[i];
  }
  for (; j < k; ++j) {
    const real *a = V[j] + at, ha = (real)h[j];
    for (int64_t i = 0; i < whole; i += kLanes) store(w + i, subtract_multiple(load(w + i), ha, load(a + i)));
    for (int64_t i = whole; i < n; ++i) w[i] = w[i] - ha * a[i];
  }
}

// y ← factor · x; x and y may be the same.
static void scale(const real* x, real factor, real* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = factor * x[i];
}

// max |x_i|; a NaN is passed over here and caught by the norm.
static real amax(const real* x, int64_t n) {
  const int64_t whole = n - n % kWord;
  word m = {};
  for (int64_t i = 0; i < whole; i += kWord) {
    const word v = *(const word*)(x + i), a = v < 0 ? -v : v;
    m = a > m ? a : m;
  }
  real most = 0;
  for (int l = 0; l < (int)kWord; ++l) most = m[l] > most ? m[l] : most;
  for (int64_t i = whole; i < n; ++i) {
    const real a = x[i] < 0 ? -x[i] : x[i];
    most = a > most ? a : most;
  }
  return most;
}
