// Winograd's transforms for 2 × 2 results of a 3 × 3 kernel, and the products between them. For each_isa.inl.
//   y = Aᵀ[(G w Gᵀ) ⊙ (Bᵀ x B)]A,   dw = Gᵀ[Σ (Bᵀ x B) ⊙ (A dy Aᵀ)]G
// Channels run along the registers, in multiples of 64 bytes. A transformed tile has 16 values; plane i holds the i-th
// of all tiles.

#include "multiply.inl"

typedef Product<float>::word word;
enum { kLanes = kWordBytes / sizeof(float) };

// ---- one axis of each transform ----

struct InputAxis {  // Bᵀ
  enum { from = 4, to = 4 };
  static inline __attribute__((always_inline)) void apply(const word* x, word* v) {
    v[0] = x[0] - x[2], v[1] = x[1] + x[2], v[2] = x[2] - x[1], v[3] = x[1] - x[3];
  }
};

struct OutputAxis {  // Aᵀ
  enum { from = 4, to = 2 };
  static inline __attribute__((always_inline)) void apply(const word* m, word* y) {
    y[0] = m[0] + m[1] + m[2], y[1] = m[1] - m[2] - m[3];
  }
};

struct GradOutputAxis {  // A
  enum { from = 2, to = 4 };
  static inline __attribute__((always_inline)) void apply(const word* dy, word* d) {
    d[0] = dy[0], d[1] = dy[0] + dy[1], d[2] = dy[0] - dy[1], d[3] = -dy[1];
  }
};

struct WeightAxis {  // G
  enum { from = 3, to = 4 };
  static inline __attribute__((always_inline)) void apply(const word* w, word* u) {
    const word outer = w[0] + w[2];
    u[0] = w[0], u[1] = .5f * (outer + w[1]), u[2] = .5f * (outer - w[1]), u[3] = w[2];
  }
};

struct GradWeightAxis {  // Gᵀ
  enum { from = 4, to = 3 };
  static inline __attribute__((always_inline)) void apply(const word* u, word* dw) {
    const word half = .5f * (u[1] + u[2]);
    dw[0] = u[0] + half, dw[1] = .5f * (u[1] - u[2]), dw[2] = half + u[3];
  }
};

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
static void from_planes(const float* planes, int64_t plane, int64_t row, int64_t tiles, int64_t channels,
                        float* const* pixels, int64_t first) {
  for (int64_t t = 0; t < tiles; ++t)
    for (int64_t c = 0; c < channels; c += kLanes) {
      word in[16], out[4];
      for (int i = 0; i < 16; ++i) in[i] = *(const word*)(planes + i * plane + t * row + c);
      both_axes<OutputAxis>(in, out);
      for (int i = 0; i < 4; ++i)
        if (float* const pixel = pixels[t * 4 + i]) *(word*)(pixel + first + c) = out[i];
    }
}

// ---- weights: taps (9, rows, columns) with strides, planes (16, rows, width) for columns that lie side by side ----

static void transform_weight(const float* w, int64_t tap, int64_t row, bool flip, int64_t rows, int64_t width,
                             float* planes, int64_t plane) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < width; c += kLanes) {
      word in[9], out[16];
      for (int i = 0; i < 9; ++i) in[i] = *(const word*)(w + (flip ? 8 - i : i) * tap + r * row + c);
      both_axes<WeightAxis>(in, out);
      for (int i = 0; i < 16; ++i) *(word*)(planes + i * plane + r * width + c) = out[i];
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
