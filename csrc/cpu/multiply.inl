// Matrix products of rows that are whole registers. Included like each_isa.inl does: kWordBytes is defined.
//
// Matrices are row-major; the columns of B and C are a multiple of 64 bytes.

template <class T>
struct Product {
  typedef T word __attribute__((vector_size(kWordBytes), aligned(sizeof(T)), may_alias));
  static constexpr int kLanes = kWordBytes / sizeof(T), kTileRows = 6;
  static constexpr int kTileWords = kWordBytes == 64 ? 4 : 2;  // registers in a row of a tile

  // C ← A B, or C + A B with `add`, for rows × words·kLanes entries of C that stay in registers; A has strides (rs,
  // cs).
  template <int rows, int words>
  static inline void multiply_tile(const T* A, int64_t rs, int64_t cs, const T* B, int64_t ldb, T* C, int64_t ldc,
                                   int64_t K, bool add) {
    word sum[rows][words] = {};
    for (int64_t k = 0; k < K; ++k) {
      word b[words];
      for (int w = 0; w < words; ++w) b[w] = *(const word*)(B + k * ldb + w * kLanes);
      for (int i = 0; i < rows; ++i)
        for (int w = 0; w < words; ++w) sum[i][w] += A[i * rs + k * cs] * b[w];
    }
    for (int i = 0; i < rows; ++i)
      for (int w = 0; w < words; ++w) {
        word* const c = (word*)(C + i * ldc + w * kLanes);
        *c = add ? *c + sum[i][w] : sum[i][w];
      }
  }

  template <int words>
  static void multiply_columns(const T* A, int64_t rs, int64_t cs, const T* B, int64_t ldb, T* C, int64_t ldc,
                               int64_t M, int64_t K, bool add) {
    constexpr int kRows = words == 1 ? 2 * kTileRows : kTileRows;  // enough sums to hide the latency of their additions
    int64_t i = 0;
    for (; i + kRows <= M; i += kRows)
      multiply_tile<kRows, words>(A + i * rs, rs, cs, B, ldb, C + i * ldc, ldc, K, add);
    for (; i + 4 <= M; i += 4) multiply_tile<4, words>(A + i * rs, rs, cs, B, ldb, C + i * ldc, ldc, K, add);
    for (; i < M; ++i) multiply_tile<1, words>(A + i * rs, rs, cs, B, ldb, C + i * ldc, ldc, K, add);
  }

  // C (M, N) ← A (M, K) B (K, N), or C + A B. The sums run over k in order whatever N is.
  static void multiply(const T* A, int64_t rs, int64_t cs, const T* B, int64_t ldb, T* C, int64_t ldc, int64_t M,
                       int64_t N, int64_t K, bool add) {
    int64_t j = 0;
    for (; j + kTileWords * kLanes <= N; j += kTileWords * kLanes)
      multiply_columns<kTileWords>(A, rs, cs, B + j, ldb, C + j, ldc, M, K, add);
    for (; j + 2 * kLanes <= N; j += 2 * kLanes) multiply_columns<2>(A, rs, cs, B + j, ldb, C + j, ldc, M, K, add);
    for (; j < N; j += kLanes) multiply_columns<1>(A, rs, cs, B + j, ldb, C + j, ldc, M, K, add);
  }
};
