// Transposition of a matrix of 2-, 4- or 8-byte values. Included like each_isa.inl does: kWordBytes is defined.
//   out[c, r] = in[r, c],  in (rows, columns) with stride in_stride, out (columns, rows) with stride out_stride
// Tiles of n × n values pass through n registers: stage s = 1, 2, 4, … exchanges, between rows i and i + s (bit s of i
// clear), the columns with bit s set of the first with those with bit s clear of the second; log₂ n stages transpose.
// The last tile of a row or column overlaps the one before it. A matrix narrower than a tile takes the next smaller
// one.

enum { kMostLanes = 16 };  // 32 rows of 2-byte values would not fit into the registers

template <class T, int n>
struct Tile {
  typedef T row __attribute__((vector_size(n * sizeof(T))));
  typedef T unaligned_row __attribute__((vector_size(n * sizeof(T)), aligned(sizeof(T)), may_alias));

  // Lane l of the result is lane lanes[l] of (a, b).
  static inline __attribute__((always_inline)) row pick(row a, row b, row lanes) {
#if defined(__clang__)
    row result;
    for (int l = 0; l < n; ++l) result[l] = lanes[l] < n ? a[lanes[l]] : b[lanes[l] - n];
    return result;
#else
    return __builtin_shuffle(a, b, lanes);
#endif
  }

  template <int s>
  static inline __attribute__((always_inline)) void exchange(row* v) {
    row first, second;
    for (int l = 0; l < n; ++l) {
      first[l] = static_cast<T>(l & s ? n + (l ^ s) : l);
      second[l] = static_cast<T>(l & s ? n + l : l ^ s);
    }
    for (int i = 0; i < n; ++i)
      if (!(i & s)) {
        const row a = v[i], b = v[i + s];
        v[i] = pick(a, b, first);
        v[i + s] = pick(a, b, second);
      }
    if constexpr (2 * s < n) exchange<2 * s>(v);
  }

  static inline void transpose(const T* in, int64_t in_stride, T* out, int64_t out_stride) {
    row v[n];
    for (int i = 0; i < n; ++i) v[i] = *reinterpret_cast<const unaligned_row*>(in + i * in_stride);
    exchange<1>(v);
    for (int i = 0; i < n; ++i) *reinterpret_cast<unaligned_row*>(out + i * out_stride) = v[i];
  }
};

template <class T, int n>
static void transpose_by(const T* in, int64_t in_stride, int64_t rows, int64_t columns, T* out, int64_t out_stride) {
  if constexpr (n < 4) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; ++c) out[c * out_stride + r] = in[r * in_stride + c];
  } else if (rows < n || columns < n) {
    transpose_by<T, n / 2>(in, in_stride, rows, columns, out, out_stride);
  } else {
    for (int64_t i = 0; i < rows; i += n) {
      const int64_t r = i + n <= rows ? i : rows - n;
      for (int64_t j = 0; j < columns; j += n) {
        const int64_t c = j + n <= columns ? j : columns - n;
        Tile<T, n>::transpose(in + r * in_stride + c, in_stride, out + c * out_stride + r, out_stride);
      }
    }
  }
}

template <class T>
static void transpose(const T* in, int64_t in_stride, int64_t rows, int64_t columns, T* out, int64_t out_stride) {
  constexpr int lanes = kWordBytes / sizeof(T);
  transpose_by<T, (lanes < kMostLanes ? lanes : kMostLanes)>(in, in_stride, rows, columns, out, out_stride);
}
