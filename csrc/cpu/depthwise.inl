// Loops of depthwise.cpp, channels side by side in vectors. For each_isa.inl.
#include "vectors.inl"

// f(c, k) for vectors of k channels from c on
template <typename acc, class F>
CONVBN_INLINE void for_each_channel_vector(int64_t channels, F f) {
  constexpr int lanes = kLanes<acc>;
  int64_t c = 0;
  for (; c + lanes <= channels; c += lanes) f(c, lanes);
  if (c < channels) f(c, int(channels - c));
}

template <typename scalar_t>
void widen_elements(const scalar_t* in, acc_t<scalar_t>* out, int64_t n) {
  for_each_channel_vector<scalar_t>(
      n, [=](int64_t i, int k) __attribute__((always_inline)) { store(out + i, load(in + i, k), k); });
}

// So many results at once that their sums stay in registers; kernels of three columns are unrolled.
template <int results, int columns, typename acc, typename scalar_t>
CONVBN_INLINE void depthwise_results(const DepthwiseTaps<acc>& taps, int64_t i, int64_t source_step, const acc* weight,
                                     scalar_t* out, int64_t out_step, int k) {
  vec<acc> sum[results] = {};
  for (int64_t r = 0; r < taps.rows; ++r)
    for (int64_t j = 0; j < (columns ? columns : taps.columns); ++j) {
      const vec<acc> w = load(weight + taps.row_weight[r] + taps.column_weight[j], k);
      const acc* const from = taps.row[r] + taps.column[j] + i;
      for (int q = 0; q < results; ++q) sum[q] += load(from + q * source_step, k) * w;
    }
  for (int q = 0; q < results; ++q) store(out + q * out_step, sum[q], k);
}

template <int columns, typename acc, typename scalar_t>
CONVBN_INLINE void depthwise_stretch(const DepthwiseTaps<acc>& taps, int64_t source_step, const acc* weight,
                                     scalar_t* out, int64_t out_step, int64_t n, int64_t channels) {
  enum { many = 8 };
  for_each_channel_vector<acc>(channels, [=, &taps](int64_t c, int k) __attribute__((always_inline)) {
    const auto results = [=, &taps]<int count>(int64_t q) __attribute__((always_inline)) {
      depthwise_results<count, columns>(taps, q * source_step + c, source_step, weight + c, out + q * out_step + c,
                                        out_step, k);
    };
    int64_t q = 0;
    for (; q + many <= n; q += many) results.template operator()<many>(q);
    for (; q + 2 <= n; q += 2) results.template operator()<2>(q);
    if (q < n) results.template operator()<1>(q);
  });
}

// out[q·out_step + c] = Σ_rj (row[r] + column[j])[q·source_step + c]·weight[row_weight[r] + column_weight[j] + c],
// 0 ≤ q < n
template <typename acc, typename scalar_t>
void depthwise_row(const DepthwiseTaps<acc>& taps, int64_t source_step, const acc* weight, scalar_t* out,
                   int64_t out_step, int64_t n, int64_t channels) {
  (taps.columns == 3 ? depthwise_stretch<3, acc, scalar_t>
                     : depthwise_stretch<0, acc, scalar_t>)(taps, source_step, weight, out, out_step, n, channels);
}

// For so many columns of taps, in several chains: additions need not wait for each other.
template <int columns, typename acc>
CONVBN_INLINE void depthwise_tap_sums(const acc* source, const int64_t* column, const int64_t* at, int64_t source_step,
                                      const acc* grad, int64_t grad_step, int64_t n, acc* sums, int k) {
  enum { chains = 4 };
  vec<acc> sum[chains][columns] = {};
  const acc* from[columns];
  for (int j = 0; j < columns; ++j) from[j] = source + column[j];
  const auto add = [&](int64_t q, int chain) __attribute__((always_inline)) {
    const vec<acc> g = load(grad + q * grad_step, k);
    for (int j = 0; j < columns; ++j) sum[chain][j] += load(from[j] + q * source_step, k) * g;
  };
  int64_t q = 0;
  for (; q + chains <= n; q += chains)
    for (int chain = 0; chain < chains; ++chain) add(q + chain, chain);
  for (; q < n; ++q) add(q, 0);
  for (int j = 0; j < columns; ++j) {
    vec<acc> total = sum[0][j];
    for (int chain = 1; chain < chains; ++chain) total += sum[chain][j];
    store(sums + at[j], load(sums + at[j], k) + total, k);
  }
}

// sums[row_weight[r] + column_weight[j] + c] += Σ_q (row[r] + column[j])[q·source_step + c]·grad[q·channels + c],
// 0 ≤ q < n
template <typename acc>
void depthwise_sums(const DepthwiseTaps<acc>& taps, int64_t source_step, const acc* grad, int64_t n, int64_t channels,
                    acc* sums) {
  for_each_channel_vector<acc>(channels, [=, &taps](int64_t c, int k) __attribute__((always_inline)) {
    for (int64_t r = 0; r < taps.rows; ++r) {
      const auto some = [=, &taps]<int count>(int64_t j) __attribute__((always_inline)) {
        depthwise_tap_sums<count>(taps.row[r] + c, taps.column + j, taps.column_weight + j, source_step, grad + c,
                                  channels, n, sums + taps.row_weight[r] + c, k);
      };
      int64_t j = 0;
      for (; j + 3 <= taps.columns; j += 3) some.template operator()<3>(j);
      if (j + 2 == taps.columns) some.template operator()<2>(j);
      if (j + 1 == taps.columns) some.template operator()<1>(j);
    }
  });
}

// sums[(3i + j)·channels + c] += Σ_rq x[first·s + r·s + i − p, q·s + j − p][c]·grad[r, q][c], each in a register of its
// own for all rows; at a border one row or column of taps is missing.
template <typename acc>
void depthwise_sums_3x3(const ThreeByThree<acc>& t, int64_t channels, acc* sums) {
  const int64_t right = t.columns - ((t.columns - 1) * t.stride[1] - t.padding[1] + 3 > t.x_width);
  for_each_channel_vector<acc>(channels, [=, &t](int64_t c, int k) __attribute__((always_inline)) {
    vec<acc> sum[9] = {};
    for (int64_t r = 0; r < t.rows; ++r) {
      const int64_t top = (t.first + r) * t.stride[0] - t.padding[0];
      const acc* const x = t.x + c + ((top - t.x_first) * t.x_width - t.padding[1]) * channels;
      const acc* const grad = t.grad + c + r * t.columns * channels;
      const auto row = [&]<int low, int high>() __attribute__((always_inline)) {
        const auto result = [&]<int left, int end>(int64_t q) __attribute__((always_inline)) {
          const vec<acc> g = load(grad + q * channels, k);
          for (int i = low; i < high; ++i)
            for (int j = left; j < end; ++j)
              sum[3 * i + j] += load(x + (i * t.x_width + q * t.stride[1] + j) * channels, k) * g;
        };
        int64_t q = 0;
        if (t.padding[1]) result.template operator()<1, 3>(q++);
        for (; q < right; ++q) result.template operator()<0, 3>(q);
        if (q < t.columns) result.template operator()<0, 2>(q);
      };
      if (top < 0)
        row.template operator()<1, 3>();
      else if (top + 3 > t.x_height)
        row.template operator()<0, 2>();
      else
        row.template operator()<0, 3>();
    }
    for (int i = 0; i < 9; ++i) store(sums + i * channels + c, load(sums + i * channels + c, k) + sum[i], k);
  });
}
