// Winograd's transforms for tiles of m × m results of a 3 × 3 kernel, and the products between them. For each_isa.inl.
//   y = Aᵀ[(G w Gᵀ) ⊙ (Bᵀ x B)]A,   dw = Gᵀ[Σ (Bᵀ x B) ⊙ (A dy Aᵀ)]G
// Polynomials (a row of w has degree 2) are multiplied at m + 2 points: at 0, 1, −1, ∞ for m = 2, at 0, ±p, ±q, ∞ for
// m = 4. p = 5/8 and q = 3/2 need no rounding, nor do their powers, and err half as much as the usual 1 and 2.
//
// Channels run along the registers, in multiples of 64 bytes. A transformed tile has (m + 2)² values; plane i holds the
// i-th of all tiles.

#include "multiply.inl"

typedef Product<float>::word word;
enum { kLanes = kWordBytes / sizeof(float) };

// ---- one axis of each transform ----

#define CONVBN_AXIS static inline __attribute__((always_inline)) void apply
constexpr float p = .625f, q = 1.5f, pp = p * p, qq = q * q;

template <int m>
struct InputAxis;  // Bᵀ
template <int m>
struct OutputAxis;  // Aᵀ
template <int m>
struct WeightAxis;  // G

template <>
struct InputAxis<2> {
  enum { from = 4, to = 4 };
  CONVBN_AXIS(const word* x, word* v) {
    v[0] = x[0] - x[2], v[1] = x[1] + x[2], v[2] = x[2] - x[1], v[3] = x[1] - x[3];
  }
};

template <>
struct OutputAxis<2> {
  enum { from = 4, to = 2 };
  CONVBN_AXIS(const word* m, word* y) { y[0] = m[0] + m[1] + m[2], y[1] = m[1] - m[2] - m[3]; }
};

template <>
struct WeightAxis<2> {
  enum { from = 3, to = 4 };
  CONVBN_AXIS(const word* w, word* u) {
    const word outer = w[0] + w[2];
    u[0] = w[0], u[1] = .5f * (outer + w[1]), u[2] = .5f * (outer - w[1]), u[3] = w[2];
  }
};

template <>
struct InputAxis<4> {
  enum { from = 6, to = 6 };
  CONVBN_AXIS(const word* x, word* v) {
    const word even_p = x[4] - qq * x[2], odd_p = p * (x[3] - qq * x[1]);
    const word even_q = x[4] - pp * x[2], odd_q = q * (x[3] - pp * x[1]);
    v[0] = pp * qq * x[0] - (pp + qq) * x[2] + x[4];
    v[1] = even_p + odd_p, v[2] = even_p - odd_p, v[3] = even_q + odd_q, v[4] = even_q - odd_q;
    v[5] = pp * qq * x[1] - (pp + qq) * x[3] + x[5];
  }
};

template <>
struct OutputAxis<4> {
  enum { from = 6, to = 4 };
  CONVBN_AXIS(const word* m, word* y) {
    const word even_p = m[1] + m[2], odd_p = p * (m[1] - m[2]), even_q = m[3] + m[4], odd_q = q * (m[3] - m[4]);
    y[0] = m[0] + even_p + even_q;
    y[1] = odd_p + odd_q;
    y[2] = pp * even_p + qq * even_q;
    y[3] = pp * odd_p + qq * odd_q + m[5];
  }
};

template <>
struct WeightAxis<4> {
  enum { from = 3, to = 6 };
  CONVBN_AXIS(const word* w, word* u) {
    constexpr float at_0 = 1 / (pp * qq), at_p = 1 / (2 * pp * (pp - qq)), at_q = 1 / (2 * qq * (qq - pp));
    const word even_p = w[0] + pp * w[2], even_q = w[0] + qq * w[2], odd_p = p * w[1], odd_q = q * w[1];
    u[0] = at_0 * w[0];
    u[1] = at_p * (even_p + odd_p), u[2] = at_p * (even_p - odd_p);
    u[3] = at_q * (even_q + odd_q), u[4] = at_q * (even_q - odd_q);
    u[5] = w[2];
  }
};

struct GradOutputAxis {  // A, m = 2
  enum { from = 2, to = 4 };
  CONVBN_AXIS(const word* dy, word* d) { d[0] = dy[0], d[1] = dy[0] + dy[1], d[2] = dy[0] - dy[1], d[3] = -dy[1]; }
};

struct GradWeightAxis {  // Gᵀ, m = 2
  enum { from = 4, to = 3 };
  CONVBN_AXIS(const word* u, word* dw) {
    const word half = .5f * (u[1] + u[2]);
    dw[0] = u[0] + half, dw[1] = .5f * (u[1] - u[2]), dw[2] = half + u[3];
  }
};
#undef CONVBN_AXIS

// out (to, to) of in (from, from)
template <class Axis>
static inline __attribute__((always_inline)) void both_axes(const word* in, word* out) {
  word rows[Axis::to * Axis::from];  // transposed
  for (int j = 0; j < Axis::from; ++j) {
    word column[Axis::from], result[Axis::to];
    for (int i = 0; i < Axis::from; ++i) column[i] = in[i * Axis::from + j];
    Axis::apply(column, result);
    for (int i = 0; i < Axis::to; ++i) rows[i * Axis::from + j] = result[i];
  }
  for (int i = 0; i < Axis::to; ++i) Axis::apply(rows + i * Axis::from, out + i * Axis::to);
}

// ---- tiles ----

// Planes of Axis's transform of tiles whose pixels (from², per tile) point to their channels, those from `first` on.
template <class Axis>
static void to_planes(const float* const* pixels, int64_t first, int64_t tiles, int64_t channels, float* planes,
                      int64_t plane, int64_t row) {
  constexpr int from = Axis::from * Axis::from, to = Axis::to * Axis::to;
  for (int64_t t = 0; t < tiles; ++t)
    for (int64_t c = 0; c < channels; c += kLanes) {
      word in[from], out[to];
      for (int i = 0; i < from; ++i) in[i] = *(const word*)(pixels[t * from + i] + first + c);
      both_axes<Axis>(in, out);
      for (int i = 0; i < to; ++i) *(word*)(planes + i * plane + t * row + c) = out[i];
    }
}

// Results of tiles from their planes; null pixels are not wanted.
template <class Axis>
static void from_planes(const float* planes, int64_t plane, int64_t row, int64_t tiles, int64_t channels,
                        float* const* pixels, int64_t first) {
  constexpr int from = Axis::from * Axis::from, to = Axis::to * Axis::to;
  for (int64_t t = 0; t < tiles; ++t)
    for (int64_t c = 0; c < channels; c += kLanes) {
      word in[from], out[to];
      for (int i = 0; i < from; ++i) in[i] = *(const word*)(planes + i * plane + t * row + c);
      both_axes<Axis>(in, out);
      for (int i = 0; i < to; ++i)
        if (float* const pixel = pixels[t * to + i]) *(word*)(pixel + first + c) = out[i];
    }
}

// ---- weights: taps (9, rows, columns) with strides, planes (·, rows, width) for columns that lie side by side ----

template <class Axis>
static void transform_weight(const float* w, int64_t tap, int64_t row, bool flip, int64_t rows, int64_t width,
                             float* planes, int64_t plane) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < width; c += kLanes) {
      word in[9], out[Axis::to * Axis::to];
      for (int i = 0; i < 9; ++i) in[i] = *(const word*)(w + (flip ? 8 - i : i) * tap + r * row + c);
      both_axes<Axis>(in, out);
      for (int i = 0; i < Axis::to * Axis::to; ++i) *(word*)(planes + i * plane + r * width + c) = out[i];
    }
}

// The planes of `parts` slices are added first, in order.
static void transform_grad_weight(const float* planes, int64_t plane, int64_t parts, int64_t part, int64_t rows,
                                  int64_t width, float* dw, int64_t tap, int64_t row) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < width; c += kLanes) {
      word in[16], out[9];
      for (int i = 0; i < 16; ++i) {
        const float* from = planes + i * plane + r * width + c;
        in[i] = *(const word*)from;
        for (int64_t p = 1; p < parts; ++p) in[i] += *(const word*)(from + p * part);
      }
      both_axes<GradWeightAxis>(in, out);
      for (int i = 0; i < 9; ++i) *(word*)(dw + i * tap + r * row + c) = out[i];
    }
}

static void multiply(const float* A, int64_t rs, int64_t cs, const float* B, int64_t ldb, float* C, int64_t ldc,
                     int64_t M, int64_t N, int64_t K, bool add) {
  Product<float>::multiply(A, rs, cs, B, ldb, C, ldc, M, N, K, add);
}
