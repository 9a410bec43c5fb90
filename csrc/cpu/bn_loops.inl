// The loops themselves, in plain C++ over vectors. Included inside a namespace and a target region.
#include "vectors.inl"

// ---- activations: value at v, and derivative at v times the incoming gradient ----

template <class V>
using lane = decltype(V{}[0] + 0);

struct Identity {
  static constexpr bool needs_value = false;
  template <class V>
  static CONVBN_INLINE V value(V v, V) {
    return v;
  }
  template <class V>
  static CONVBN_INLINE V gradient(V, V g, V) {
    return g;
  }
};
struct Relu {
  static constexpr bool needs_value = true;
  template <class V>
  static CONVBN_INLINE V value(V v, V) {
    return v <= 0 ? V{} : v;  // NaN passes
  }
  template <class V>
  static CONVBN_INLINE V gradient(V v, V g, V) {
    return v <= 0 ? V{} : g;
  }
};
struct LeakyRelu {
  static constexpr bool needs_value = true;
  template <class V>
  static CONVBN_INLINE V value(V v, V slope) {
    return v > 0 ? v : v * slope;
  }
  template <class V>
  static CONVBN_INLINE V gradient(V v, V g, V slope) {
    return v > 0 ? g : g * slope;
  }
};
struct Silu {  // v·s, s = 1/(1 + e⁻ᵛ);  s·(1 + v·(1 − s))
  static constexpr bool needs_value = true;
  template <class V>
  static CONVBN_INLINE V value(V v, V) {
    return v / (1 + exp(-v));
  }
  template <class V>
  static CONVBN_INLINE V gradient(V v, V g, V) {
    const V s = 1 / (1 + exp(-v));
    return g * s * (1 + v * (1 - s));
  }
};
struct Gelu {  // v·Φ(v);  Φ(v) + v·φ(v)
  static constexpr bool needs_value = true;
  template <class V>
  static CONVBN_INLINE V cdf(V v) {
    return lane<V>(0.5) * (1 + erf(v * lane<V>(0.70710678118654752440)));
  }
  template <class V>
  static CONVBN_INLINE V value(V v, V) {
    return v * cdf(v);
  }
  template <class V>
  static CONVBN_INLINE V gradient(V v, V g, V) {
    const V pdf = lane<V>(0.39894228040143267794) * exp(v * v * lane<V>(-0.5));
    return g * (cdf(v) + v * pdf);
  }
};
struct Hardswish {  // v·min(max(v + 3, 0), 6)/6
  static constexpr bool needs_value = true;
  template <class V>
  static CONVBN_INLINE V value(V v, V) {
    const V t = v + 3;
    return v * (t < 0 ? V{} : t > 6 ? V{} + 6 : t) / 6;
  }
  template <class V>
  static CONVBN_INLINE V gradient(V v, V g, V) {
    return v <= -3 ? V{} : v < 3 ? g * (v / 3 + lane<V>(0.5)) : g;
  }
};

// ---- drivers ----
//
// f(p, i, k, …) sees the k elements from i on. p = parameters(of) is what belongs to them, formed once for the rows of
// a tile or for a plane; there of(vector) are the vector's values for these elements.

template <class V>
struct OfColumns {
  int64_t c;
  int k;
  template <class acc>
  CONVBN_INLINE V operator()(const acc* vector) const {
    return load(vector + c, k);
  }
};
template <class V>
struct OfPlane {
  int64_t plane;
  template <class acc>
  CONVBN_INLINE V operator()(const acc* vector) const {
    return V{} + vector[plane];
  }
};

// f(i, rows, c, k) for tiles of up to eight rows and k columns from c on, the first element being i
constexpr int64_t kTileRows = 8;
template <int lanes, class F>
CONVBN_INLINE void for_each_tile(const Span span, F f) {
  const int64_t width = span.width;
  int64_t row = 0;
  for (int64_t left = span.elements; left > 0;) {
    const int64_t used = width < left ? width : left;
    const int64_t rows = kTileRows * width <= left ? kTileRows : width <= left ? left / width : 1;
    int64_t c = 0;
    if (rows == kTileRows)
      for (; c + lanes <= used; c += lanes) f(row + c, kTileRows, c, lanes);
    else
      for (; c + lanes <= used; c += lanes) f(row + c, rows, c, lanes);
    if (c < used) f(row + c, rows, c, int(used - c));
    row += rows * span.stride;
    left -= rows * used;
  }
}

template <typename scalar_t, class Parameters, class F>
CONVBN_INLINE void for_each_vector(const Span span, Parameters parameters, F f) {
  using V = vec<scalar_t>;
  constexpr int lanes = kLanes<scalar_t>;
  if (span.width > 1) {
    for_each_tile<lanes>(span, [=](int64_t i, int64_t rows, int64_t c, int k) __attribute__((always_inline)) {
      const auto p = parameters(OfColumns<V>{c, k});
      for (int64_t r = 0; r < rows; ++r) f(p, i + r * span.stride, k);
    });
    return;
  }
  for (int64_t plane = 0; plane < span.runs; ++plane) {
    const auto p = parameters(OfPlane<V>{plane});
    int64_t i = plane * span.elements;
    const int64_t end = i + span.elements;
    for (; i + lanes <= end; i += lanes) f(p, i, lanes);
    if (i < end) f(p, i, int(end - i));
  }
}

// f(p, i, k, s1, s2) adds to two sums per column, of which a plane has kPlaneWidth; sum2 may be null.
template <typename scalar_t, class Parameters, class F>
CONVBN_INLINE void accumulate(const Span span, acc_t<scalar_t>* sum1, acc_t<scalar_t>* sum2, Parameters parameters,
                              F f) {
  using V = vec<scalar_t>;
  constexpr int lanes = kLanes<scalar_t>, chains = 4;  // a plane's additions need not wait for each other
  if (span.width > 1) {
    for_each_tile<lanes>(span, [=](int64_t i, int64_t rows, int64_t c, int k) __attribute__((always_inline)) {
      const auto p = parameters(OfColumns<V>{c, k});
      V s1 = load(sum1 + c, k), s2{};
      if (sum2) s2 = load(sum2 + c, k);
      for (int64_t r = 0; r < rows; ++r) f(p, i + r * span.stride, k, s1, s2);
      store(sum1 + c, s1, k);
      if (sum2) store(sum2 + c, s2, k);
    });
    return;
  }
  for (int64_t plane = 0; plane < span.runs; ++plane) {
    const auto p = parameters(OfPlane<V>{plane});
    V s1[chains] = {}, s2[chains] = {};
    int64_t i = plane * span.elements;
    const int64_t end = i + span.elements;
    for (; i + chains * lanes <= end; i += chains * lanes)
      for (int chain = 0; chain < chains; ++chain) f(p, i + chain * lanes, lanes, s1[chain], s2[chain]);
    for (; i + lanes <= end; i += lanes) f(p, i, lanes, s1[0], s2[0]);
    if (i < end) f(p, i, int(end - i), s1[1], s2[1]);
    const int64_t c = plane * kPlaneWidth;
    store(sum1 + c, load(sum1 + c, lanes) + ((s1[0] + s1[1]) + (s1[2] + s1[3])), lanes);
    if (sum2) store(sum2 + c, load(sum2 + c, lanes) + ((s2[0] + s2[1]) + (s2[2] + s2[3])), lanes);
  }
}

// ---- loops ----

struct NoParameters {};

template <typename scalar_t>
void sum_loop(const scalar_t* x, const Span& span, acc_t<scalar_t>* sums) {
  using V = vec<scalar_t>;
  accumulate<scalar_t>(
      span, sums, nullptr, [](auto) __attribute__((always_inline)) { return NoParameters{}; },
      [=](NoParameters, int64_t i, int k, V& s, V&) __attribute__((always_inline)) { s += load(x + i, k); });
}

template <typename scalar_t>
void moments_loop(const scalar_t* x, const Span& span, const acc_t<scalar_t>* shift, acc_t<scalar_t>* sum1,
                  acc_t<scalar_t>* sum2) {
  using V = vec<scalar_t>;
  accumulate<scalar_t>(
      span, sum1, sum2, [=](auto of) __attribute__((always_inline)) { return of(shift); },
      [=](V start, int64_t i, int k, V& s1, V& s2) __attribute__((always_inline)) {
        const V d = first(load(x + i, k) - start, k);
        s1 += d;
        s2 += d * d;
      });
}

template <class V>
struct Affine {  // (y − mean)·scale + bias
  V mean, scale, bias;
};

template <class Act, typename scalar_t>
void apply_loop(const ApplyArgs<scalar_t>& args, const Span& span) {
  using V = vec<scalar_t>;
  const ApplyArgs<scalar_t> a = args;
  const V slope = V{} + a.slope;
  for_each_vector<scalar_t>(
      span, [=](auto of) __attribute__((always_inline)) { return Affine<V>{of(a.mean), of(a.scale), of(a.bias)}; },
      [=](const Affine<V>& p, int64_t i, int k) __attribute__((always_inline)) {
        V v = (load(a.y + i, k) - p.mean) * p.scale + p.bias;
        if (a.residual) v += load(a.residual + i, k);
        store(a.out + i, Act::value(v, slope), k);
      });
}

// d = y − mean and g = grad·act′(v) of one vector
template <class Act, typename scalar_t>
struct Masked {
  vec<scalar_t> d, g;
  CONVBN_INLINE Masked(const BackwardArgs<scalar_t>& a, const Affine<vec<scalar_t>>& p, int64_t i, int k,
                       vec<scalar_t> slope) {
    d = load(a.y + i, k) - p.mean;
    g = load(a.grad + i, k);
    if constexpr (Act::needs_value) {
      vec<scalar_t> v;
      if (a.out) {
        v = load(a.out + i, k);
      } else {
        v = d * p.scale + p.bias;
        if (a.residual) v += load(a.residual + i, k);
      }
      g = Act::gradient(v, g, slope);
    }
  }
};

template <class Act, typename scalar_t>
void backward_reduce_loop(const BackwardArgs<scalar_t>& args, const Span& span) {
  using V = vec<scalar_t>;
  const BackwardArgs<scalar_t> a = args;
  const V slope = V{} + a.slope;
  accumulate<scalar_t>(
      span, a.sum_g, a.sum_gd,
      [=](auto of) __attribute__((always_inline)) { return Affine<V>{of(a.mean), of(a.scale), of(a.bias)}; },
      [=](const Affine<V>& p, int64_t i, int k, V& s1, V& s2) __attribute__((always_inline)) {
        const Masked<Act, scalar_t> m(a, p, i, k, slope);
        s1 += m.g;
        s2 += m.g * m.d;
      });
}

template <class V>
struct GradientParameters {
  Affine<V> forward;
  V a, b, c;
};

template <class Act, typename scalar_t>
void backward_apply_loop(const BackwardArgs<scalar_t>& args, const Span& span) {
  using V = vec<scalar_t>;
  const BackwardArgs<scalar_t> a = args;
  const V slope = V{} + a.slope;
  for_each_vector<scalar_t>(
      span,
      [=](auto of) __attribute__((always_inline)) {
        return GradientParameters<V>{{of(a.mean), of(a.scale), of(a.bias)}, of(a.a), of(a.b), of(a.c)};
      },
      [=](const GradientParameters<V>& p, int64_t i, int k) __attribute__((always_inline)) {
        const Masked<Act, scalar_t> m(a, p.forward, i, k, slope);
        store(a.grad_y + i, m.g * p.a + m.d * p.b + p.c, k);
        if (a.grad_residual) store(a.grad_residual + i, m.g, k);
      });
}

template <typename scalar_t>
void invert_loop(const InvertArgs<scalar_t>& args, const Span& span) {
  using V = vec<scalar_t>;
  const InvertArgs<scalar_t> a = args;
  const V slope = V{} + a.inverse_slope;
  for_each_vector<scalar_t>(
      span,
      [=](auto of) __attribute__((always_inline)) { return Affine<V>{of(a.mean), of(a.inverse_scale), of(a.bias)}; },
      [=](const Affine<V>& p, int64_t i, int k) __attribute__((always_inline)) {
        V v = LeakyRelu::value(load(a.out + i, k), slope);
        if (a.residual) v -= load(a.residual + i, k);
        store(a.y + i, (v - p.bias) * p.scale + p.mean, k);
      });
}

// The rows of the tables follow enum class Activation.
template <typename T>
constexpr BnLoops<T> table() {
  return {&sum_loop<T>,
          &moments_loop<T>,
          {&apply_loop<Identity, T>, &apply_loop<Relu, T>, &apply_loop<LeakyRelu, T>, &apply_loop<Silu, T>,
           &apply_loop<Gelu, T>, &apply_loop<Hardswish, T>},
          {&backward_reduce_loop<Identity, T>, &backward_reduce_loop<Relu, T>, &backward_reduce_loop<LeakyRelu, T>,
           &backward_reduce_loop<Silu, T>, &backward_reduce_loop<Gelu, T>, &backward_reduce_loop<Hardswish, T>},
          {&backward_apply_loop<Identity, T>, &backward_apply_loop<Relu, T>, &backward_apply_loop<LeakyRelu, T>,
           &backward_apply_loop<Silu, T>, &backward_apply_loop<Gelu, T>, &backward_apply_loop<Hardswish, T>},
          &invert_loop<T>};
}

constexpr BnLoopTables all_tables() { return {table<double>(), table<float>(), table<bf16>(), table<f16>()}; }
