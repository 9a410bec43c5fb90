// Inner loops of block_lu_cpu.cpp, float64. For each_isa.inl.
//
// Matrices are row-major and their row stride is a multiple of eight: rows are whole registers, zero beyond the matrix.

#include "multiply.inl"

typedef Product<double>::word word;
constexpr int kLanes = kWordBytes / sizeof(double), kPivots = 16;

static void multiply(const double* A, int64_t rs, int64_t cs, const double* B, int64_t ldb, double* C, int64_t ldc,
                     int64_t M, int64_t N, int64_t K, bool add) {
  Product<double>::multiply(A, rs, cs, B, ldb, C, ldc, M, N, K, add);
}

// y ← y − Σ_e value[e] X[column[e], :] for one row of a sparse matrix; X and y have N columns, a multiple of eight.
template <int words>
static inline void subtract_tile(const double* value, const int* column, int64_t entries, const double* X, int64_t ldx,
                                 double* y) {
  word sum[words];
  for (int w = 0; w < words; ++w) sum[w] = *(const word*)(y + w * kLanes);
  for (int64_t e = 0; e < entries; ++e) {
    const double* x = X + column[e] * ldx;
    for (int w = 0; w < words; ++w) sum[w] -= value[e] * *(const word*)(x + w * kLanes);
  }
  for (int w = 0; w < words; ++w) *(word*)(y + w * kLanes) = sum[w];
}

static void subtract_row(const double* value, const int* column, int64_t entries, const double* X, int64_t ldx,
                         double* y, int64_t N) {
  if (entries == 0) return;
  int64_t j = 0;
  for (; j + 8 * kLanes <= N; j += 8 * kLanes) subtract_tile<8>(value, column, entries, X + j, ldx, y + j);
  for (; j + 2 * kLanes <= N; j += 2 * kLanes) subtract_tile<2>(value, column, entries, X + j, ldx, y + j);
  for (; j < N; j += kLanes) subtract_tile<1>(value, column, entries, X + j, ldx, y + j);
}

// y[b] ← (v[b, i] − shift)·factor, b < count, for rows v[b] that lie n apart; y[b] = 0 up to eight.
template <class scalar_t>
static inline void load_eight(const scalar_t* v, int64_t n, int64_t count, double shift, double factor, double* y) {
  if (count >= 8)
    for (int b = 0; b < 8; ++b) y[b] = ((double)v[b * n] - shift) * factor;
  else
    for (int b = 0; b < 8; ++b) y[b] = b < count ? ((double)v[b * n] - shift) * factor : 0.0;
}

// Columns of a panel (positions, width) from rows v (count, n): position p takes (v[b, order[p]] − shift[p])·factor[p].
template <class scalar_t>
static void load_panel(const scalar_t* v, int64_t n, int64_t count, const int* order, const double* shift,
                       const double* factor, double* panel, int64_t positions, int64_t width) {
  for (int64_t b = 0; b < width; b += 8)
    for (int64_t p = 0; p < positions; ++p)
      load_eight(v + b * n + order[p], n, count - b, shift[p], factor[p], panel + p * width + b);
}

// The way back, as it is.
template <class scalar_t>
static void store_panel(const double* panel, int64_t positions, int64_t width, const int* order, scalar_t* v, int64_t n,
                        int64_t count) {
  for (int64_t b0 = 0; b0 < count; b0 += 8) {
    const int64_t some = count - b0 < 8 ? count - b0 : 8;
    for (int64_t p = 0; p < positions; ++p) {
      const double* x = panel + p * width + b0;
      scalar_t* to = v + b0 * n + order[p];
      if (some == 8)
        for (int b = 0; b < 8; ++b) to[b * n] = (scalar_t)x[b];
      else
        for (int b = 0; b < some; ++b) to[b * n] = (scalar_t)x[b];
    }
  }
}

// sums[b] += factor · y[b]², b < N
static void add_squares(const double* y, double factor, double* sums, int64_t N) {
  for (int64_t b = 0; b < N; ++b) sums[b] += factor * y[b] * y[b];
}

// Index of the largest |q_i|, first ≤ i < m, or −1 where none is above zero or one is not finite; q is zero from m to
// the end of its last register.
static int64_t largest(const double* q, int64_t first, int64_t m) {
  word most = {}, all = {};
  int64_t i = first;
  for (; i % kLanes != 0; ++i) {
    const double a = __builtin_fabs(q[i]);
    most[0] = a > most[0] ? a : most[0];
    all[0] += a;
  }
  for (; i < m; i += kLanes) {
    const word v = *(const word*)(q + i), a = v < 0 ? -v : v;
    most = a > most ? a : most;
    all += a;
  }
  double top = 0, sum = 0;
  for (int l = 0; l < kLanes; ++l) top = most[l] > top ? most[l] : top, sum += all[l];
  if (!(top > 0 && sum < __builtin_inf())) return -1;
  for (i = first; __builtin_fabs(q[i]) != top;) ++i;
  return i;
}

// A ← A⁻¹ (m, m) in place by Gauss–Jordan elimination with row pivoting, kPivots columns J at a time: eliminated alone
// they become Q, and all others A ← A + Q A[J, :] with the rows J of A taken as zero.
// work: 2 · kPivots · lda numbers; order: 2 m. Returns false where a pivot is zero or not finite.
static bool invert(double* A, int64_t m, int64_t lda, double* work, int* order) {
  int* swaps = order + m;
  const int64_t whole = (m + 7) / 8 * 8;
  double *Q = work, *R = work + kPivots * lda;  // columns of Q (kPivots, lda), R = A[J, :] (kPivots, lda)
  for (int64_t first = 0; first < m; first += kPivots) {
    const int64_t count = m - first < kPivots ? m - first : kPivots;
    for (int64_t i = 0; i < m; ++i)
      for (int64_t c = 0; c < count; ++c) Q[c * lda + i] = A[i * lda + first + c];
    for (int64_t c = 0; c < count; ++c)
      for (int64_t i = m; i < whole; ++i) Q[c * lda + i] = 0;
    for (int64_t c = 0; c < count; ++c) {
      const int64_t k = first + c, pivot = largest(Q + c * lda, k, m);
      if (pivot < 0) return false;
      swaps[k] = (int)pivot;
      if (pivot != k) {
        for (int64_t j = 0; j < count; ++j) {
          const double q = Q[j * lda + k];
          Q[j * lda + k] = Q[j * lda + pivot], Q[j * lda + pivot] = q;
        }
        for (int64_t j = 0; j < whole; j += kLanes) {
          const word a = *(word*)(A + k * lda + j);
          *(word*)(A + k * lda + j) = *(word*)(A + pivot * lda + j), *(word*)(A + pivot * lda + j) = a;
        }
      }
      const double* factor = Q + c * lda;
      const double scale = 1 / factor[k];
      for (int64_t j = 0; j < count; ++j) {
        if (j == c) continue;
        double* q = Q + j * lda;
        const double p = q[k] * scale;
        for (int64_t i = 0; i < m; i += kLanes) *(word*)(q + i) -= p * *(const word*)(factor + i);
        q[k] = p;
      }
      for (int64_t i = 0; i < m; ++i) Q[c * lda + i] *= -scale;
      Q[c * lda + k] = scale;
    }
    for (int64_t c = 0; c < count; ++c)
      for (int64_t j = 0; j < whole; ++j) {
        R[c * lda + j] = j >= first && j < first + count ? (double)(j == first + c) : A[(first + c) * lda + j];
        A[(first + c) * lda + j] = 0;
      }
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = first; j < whole && j < first + kPivots; j += kLanes) *(word*)(A + i * lda + j) = word{};
    multiply(Q, 1, lda, R, lda, A, lda, m, whole, count, true);
  }
  for (int64_t j = 0; j < m; ++j) order[j] = (int)j;
  for (int64_t k = m - 1; k >= 0; --k) {
    const int j = order[k];
    order[k] = order[swaps[k]], order[swaps[k]] = j;
  }
  for (int64_t i = 0; i < m; ++i) {  // row swaps of A are column swaps of its inverse, last one first
    for (int64_t j = 0; j < m; ++j) R[j] = A[i * lda + order[j]];
    for (int64_t j = 0; j < m; ++j) A[i * lda + j] = R[j];
  }
  return true;
}

// B (columns, rows) ← Aᵀ of A (rows, columns)
static void transpose(const double* A, int64_t lda, double* B, int64_t ldb, int64_t rows, int64_t columns) {
  constexpr int64_t kBlock = 8;
  for (int64_t i0 = 0; i0 < rows; i0 += kBlock)
    for (int64_t j0 = 0; j0 < columns; j0 += kBlock)
      for (int64_t j = j0; j < columns && j < j0 + kBlock; ++j)
        for (int64_t i = i0; i < rows && i < i0 + kBlock; ++i) B[j * ldb + i] = A[i * lda + j];
}

// out[b] ← old[b] + step[b] in the columns b that are active, rounded to float where `single`, else old[b]; without
// old, 0.
static void advance(const double* old, const double* step, const int64_t* active, bool single, double* out, int64_t N) {
  for (int64_t b = 0; b < N; ++b) {
    const double from = old ? old[b] : 0.0, to = from + step[b], rounded = single ? (double)(float)to : to;
    out[b] = active[b] ? rounded : from;
  }
}
