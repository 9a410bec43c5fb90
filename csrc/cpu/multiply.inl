// Matrix products of rows that are whole registers. Included like each_isa.inl does: kWordBytes is defined.
//
// Matrices are row-major; the columns of B and C are a multiple of 64 bytes.

template <class T>
struct Product {
  typedef T word __attribute__((vector_size(kWordBytes), aligned(sizeof(T)), may_alias));
  static constexpr int kLanes = kWordBytes / sizeof(T), kTileRows = 6;
  static constexpr int kTileWords = kWordBytes == 64 ? 4 : 2;  // registers in a row of a tile

  // Σ_s A_s B_s, s < count: A_s (M, K) with strides (rs, cs), B_s (K, N) with rows ldb apart
  struct Terms {
    const T *const *A, *const *B;
    int64_t count, rs, cs, ldb, K;
  };

  // C ← the terms' sum, or C + that with `add`, for rows × words·kLanes entries of C, from row i and column j on, that
  // stay in registers. columns: rs is 1, which the compiler shall know.
  template <int rows, int words, bool columns>
  static inline void multiply_tile(const Terms& terms, int64_t i, int64_t j, T* C, int64_t ldc, bool add) {
    const int64_t rs = columns ? 1 : terms.rs, cs = terms.cs, ldb = terms.ldb, K = terms.K;
    word sum[rows][words] = {};
    for (int64_t s = 0; s < terms.count; ++s) {
      const T *const A = terms.A[s] + i * rs, *const B = terms.B[s] + j;
      for (int64_t k = 0; k < K; ++k) {
        word b[words];
        for (int w = 0; w < words; ++w) b[w] = *(const word*)(B + k * ldb + w * kLanes);
        for (int r = 0; r < rows; ++r)
          for (int w = 0; w < words; ++w) sum[r][w] += A[r * rs + k * cs] * b[w];
      }
    }
    for (int r = 0; r < rows; ++r)
      for (int w = 0; w < words; ++w) {
        word* const c = (word*)(C + (i + r) * ldc + j + w * kLanes);
        *c = add ? *c + sum[r][w] : sum[r][w];
      }
  }

  template <int words, bool columns>
  static void multiply_columns(const Terms& terms, int64_t j, T* C, int64_t ldc, int64_t M, bool add) {
    constexpr int kRows = words == 1 ? 2 * kTileRows : kTileRows;  // enough sums to hide the latency of their additions
    int64_t i = 0;
    for (; i + kRows <= M; i += kRows) multiply_tile<kRows, words, columns>(terms, i, j, C, ldc, add);
    for (; i + 4 <= M; i += 4) multiply_tile<4, words, columns>(terms, i, j, C, ldc, add);
    for (; i + 2 <= M; i += 2) multiply_tile<2, words, columns>(terms, i, j, C, ldc, add);
    for (; i < M; ++i) multiply_tile<1, words, columns>(terms, i, j, C, ldc, add);
  }

  template <bool columns>
  static void multiply_all(const Terms& terms, T* C, int64_t ldc, int64_t M, int64_t N, bool add) {
    int64_t j = 0;
    const auto fits = [&](int words) { return j + words * kLanes <= N; };
    if constexpr (kTileWords == 4) {
      for (; fits(4) && N - j != 5 * kLanes; j += 4 * kLanes) multiply_columns<4, columns>(terms, j, C, ldc, M, add);
      for (; fits(3); j += 3 * kLanes) multiply_columns<3, columns>(terms, j, C, ldc, M, add);
    }
    for (; fits(2); j += 2 * kLanes) multiply_columns<2, columns>(terms, j, C, ldc, M, add);
    for (; fits(1); j += kLanes) multiply_columns<1, columns>(terms, j, C, ldc, M, add);
  }

  // C (M, N) ← the terms' sum, or C + that. It runs over s and k in order whatever N is.
  static void multiply(const Terms& terms, T* C, int64_t ldc, int64_t M, int64_t N, bool add) {
    terms.rs == 1 ? multiply_all<true>(terms, C, ldc, M, N, add) : multiply_all<false>(terms, C, ldc, M, N, add);
  }

  // C (M, N) ← A (M, K) B (K, N), or C + A B
  static void multiply(const T* A, int64_t rs, int64_t cs, const T* B, int64_t ldb, T* C, int64_t ldc, int64_t M,
                       int64_t N, int64_t K, bool add) {
    multiply({&A, &B, 1, rs, cs, ldb, K}, C, ldc, M, N, add);
  }
};
