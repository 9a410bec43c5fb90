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

// f(i, c, k) for every vector: element i, column c, k lanes
template <int lanes, class F>
CONVBN_INLINE void for_each_vector(const Span span, F f) {
  for (int64_t run = 0; run < span.runs; ++run) {
    const int64_t first = run * span.width;
    int64_t row = run * span.elements;
    for (int64_t left = span.elements; left > 0; left -= span.width, row += span.stride) {
      const int64_t columns = span.width < left ? span.width : left;
      int64_t c = 0;
      for (; c + lanes <= columns; c += lanes) f(row + c, first + c, lanes);
      if (c < columns) f(row + c, first + c, int(columns - c));
    }
  }
}

// f(i, c, k, s1, s2) adds to two column sums; eight rows share one load and store of the sums
template <typename scalar_t, class F>
CONVBN_INLINE void accumulate_columns(const Span span, acc_t<scalar_t>* sum1, acc_t<scalar_t>* sum2, F f) {
  constexpr int lanes = kLanes<scalar_t>;
  constexpr int64_t kRows = 8;
  const int64_t width = span.width, stride = span.stride;
  const auto columns = [=](int64_t i, int64_t rows, int64_t c, int k) __attribute__((always_inline)) {
    vec<scalar_t> s1 = load(sum1 + c, k), s2{};
    if (sum2) s2 = load(sum2 + c, k);
    for (int64_t r = 0; r < rows; ++r) f(i + r * stride, c, k, s1, s2);
    store(sum1 + c, s1, k);
    if (sum2) store(sum2 + c, s2, k);
  };
  for (int64_t run = 0; run < span.runs; ++run) {
    const int64_t first = run * width;
    int64_t row = run * span.elements;
    for (int64_t left = span.elements; left > 0;) {
      const int64_t used = width < left ? width : left;
      const int64_t rows = kRows * width <= left ? kRows : width <= left ? left / width : 1;
      int64_t c = 0;
      if (rows == kRows)
        for (; c + lanes <= used; c += lanes) columns(row + c, kRows, first + c, lanes);
      else
        for (; c + lanes <= used; c += lanes) columns(row + c, rows, first + c, lanes);
      if (c < used) columns(row + c, rows, first + c, int(used - c));
      row += rows * stride;
      left -= rows * used;
    }
  }
}

// ---- loops ----

template <typename scalar_t>
void sum_loop(const scalar_t* x, const Span& span, acc_t<scalar_t>* sums) {
  using V = vec<scalar_t>;
  accumulate_columns<scalar_t>(span, sums, nullptr,
                               [=](int64_t i, int64_t, int k, V& s, V&)
                                   __attribute__((always_inline)) { s += load(x + i, k); });
}

template <typename scalar_t>
void moments_loop(const scalar_t* x, const Span& span, const acc_t<scalar_t>* shift, acc_t<scalar_t>* sum1,
                  acc_t<scalar_t>* sum2) {
  using V = vec<scalar_t>;
  accumulate_columns<scalar_t>(span, sum1, sum2,
                               [=](int64_t i, int64_t c, int k, V& s1, V& s2) __attribute__((always_inline)) {
                                 const V d = load(x + i, k) - load(shift + c, k);
                                 s1 += d;
                                 s2 += d * d;
                               });
}

template <class Act, typename scalar_t>
void apply_loop(const ApplyArgs<scalar_t>& args, const Span& span) {
  using V = vec<scalar_t>;
  const ApplyArgs<scalar_t> a = args;
  const V slope = V{} + a.slope;
  for_each_vector<kLanes<scalar_t>>(span, [=](int64_t i, int64_t c, int k) __attribute__((always_inline)) {
    V v = (load(a.y + i, k) - load(a.mean + c, k)) * load(a.scale + c, k) + load(a.bias + c, k);
    if (a.residual) v += load(a.residual + i, k);
    store(a.out + i, Act::value(v, slope), k);
  });
}

// d = y − mean and g = grad·act′(v) of one vector
template <class Act, typename scalar_t>
struct Masked {
  vec<scalar_t> d, g;
  CONVBN_INLINE Masked(const BackwardArgs<scalar_t>& a, int64_t i, int64_t c, int k, vec<scalar_t> slope) {
    d = load(a.y + i, k) - load(a.mean + c, k);
    g = load(a.grad + i, k);
    if constexpr (Act::needs_value) {
      vec<scalar_t> v;
      if (a.out) {
        v = load(a.out + i, k);
      } else {
        v = d * load(a.scale + c, k) + load(a.bias + c, k);
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
  accumulate_columns<scalar_t>(span, a.sum_g, a.sum_gd,
                               [=](int64_t i, int64_t c, int k, V& s1, V& s2) __attribute__((always_inline)) {
                                 const Masked<Act, scalar_t> m(a, i, c, k, slope);
                                 s1 += m.g;
                                 s2 += m.g * m.d;
                               });
}

template <class Act, typename scalar_t>
void backward_apply_loop(const BackwardArgs<scalar_t>& args, const Span& span) {
  using V = vec<scalar_t>;
  const BackwardArgs<scalar_t> a = args;
  const V slope = V{} + a.slope;
  for_each_vector<kLanes<scalar_t>>(span, [=](int64_t i, int64_t c, int k) __attribute__((always_inline)) {
    const Masked<Act, scalar_t> m(a, i, c, k, slope);
    store(a.grad_y + i, m.g * load(a.a + c, k) + m.d * load(a.b + c, k) + load(a.c + c, k), k);
    if (a.grad_residual) store(a.grad_residual + i, m.g, k);
  });
}

template <typename scalar_t>
void invert_loop(const InvertArgs<scalar_t>& args, const Span& span) {
  using V = vec<scalar_t>;
  const InvertArgs<scalar_t> a = args;
  const V slope = V{} + a.inverse_slope;
  for_each_vector<kLanes<scalar_t>>(span, [=](int64_t i, int64_t c, int k) __attribute__((always_inline)) {
    V v = LeakyRelu::value(load(a.out + i, k), slope);
    if (a.residual) v -= load(a.residual + i, k);
    store(a.y + i, (v - load(a.bias + c, k)) * load(a.inverse_scale + c, k) + load(a.mean + c, k), k);
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
