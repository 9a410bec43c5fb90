// For each_isa.inl.
#include "products.inl"

// sums[t] += Σ_r Σ_w x_rows[r][offsets[t] + w] dy_rows[r][w],  n taps, w in whole registers
template <class T, int n>
static void correlate_taps(const T* const* x_rows, const T* const* dy_rows, int64_t rows, int64_t width,
                           const int64_t* offsets, double* sums) {
  using word = typename Product<T>::word;
  word sum[n] = {};
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t w = 0; w < width; w += Product<T>::kLanes) {
      const word dy = *(const word*)(dy_rows[r] + w);
      for (int t = 0; t < n; ++t) sum[t] += *(const word*)(x_rows[r] + offsets[t] + w) * dy;
    }
  for (int t = 0; t < n; ++t)
    for (int lane = 0; lane < Product<T>::kLanes; ++lane) sums[t] += sum[t][lane];
}

template <class T>
static void correlate(const T* const* x_rows, const T* const* dy_rows, int64_t rows, int64_t width,
                      const int64_t* offsets, int64_t taps, double* sums) {
  int64_t t = 0;
  for (; taps - t >= 4; t += 4) correlate_taps<T, 4>(x_rows, dy_rows, rows, width, offsets + t, sums + t);
  if (taps - t == 3) correlate_taps<T, 3>(x_rows, dy_rows, rows, width, offsets + t, sums + t);
  if (taps - t == 2) correlate_taps<T, 2>(x_rows, dy_rows, rows, width, offsets + t, sums + t);
  if (taps - t == 1) correlate_taps<T, 1>(x_rows, dy_rows, rows, width, offsets + t, sums + t);
}
