// Loops of depthwise.cpp, channels side by side in vectors. For each_isa.inl.
#if defined(__AVX512BW__) && !defined(CONVBN_AVX512)
#define CONVBN_AVX512
#endif
#include "vectors.inl"

// f(c, k) for vectors of k channels from c on
template <typename scalar_t, class F>
CONVBN_INLINE void for_each_channel_vector(int64_t channels, F f) {
  constexpr int lanes = kLanes<scalar_t>;
  int64_t c = 0;
  for (; c + lanes <= channels; c += lanes) f(c, lanes);
  if (c < channels) f(c, int(channels - c));
}

// So many results at once that their sums stay in registers.
template <int results, typename scalar_t>
CONVBN_INLINE void depthwise_results(const scalar_t* const* source, const int64_t* at, int64_t taps, int64_t i,
                                     int64_t source_step, const acc_t<scalar_t>* weight, scalar_t* out,
                                     int64_t out_step, int k) {
  vec<scalar_t> sum[results] = {};
  for (int64_t t = 0; t < taps; ++t) {
    const vec<scalar_t> w = load(weight + at[t], k);
    const scalar_t* const from = source[t] + i;
    for (int r = 0; r < results; ++r) sum[r] += load(from + r * source_step, k) * w;
  }
  for (int r = 0; r < results; ++r) store(out + r * out_step, sum[r], k);
}

// out[q·out_step + c] = Σ_t source[t][q·source_step + c]·weight[at[t] + c],  0 ≤ q < n
template <typename scalar_t>
void depthwise_row(const scalar_t* const* source, const int64_t* at, int64_t taps, int64_t source_step,
                   const acc_t<scalar_t>* weight, scalar_t* out, int64_t out_step, int64_t n, int64_t channels) {
  enum { many = kWordBytes / 8 };
  for_each_channel_vector<scalar_t>(channels, [=](int64_t c, int k) __attribute__((always_inline)) {
    const auto results = [=]<int count>(int64_t q) __attribute__((always_inline)) {
      depthwise_results<count>(source, at, taps, q * source_step + c, source_step, weight + c, out + q * out_step + c,
                               out_step, k);
    };
    int64_t q = 0;
    for (; q + many <= n; q += many) results.template operator()<many>(q);
    for (; q + 2 <= n; q += 2) results.template operator()<2>(q);
    if (q < n) results.template operator()<1>(q);
  });
}

// For so many taps, in several chains: additions need not wait for each other.
template <int taps, typename scalar_t>
CONVBN_INLINE void depthwise_tap_sums(const scalar_t* const* source, const int64_t* at, int64_t c, int64_t source_step,
                                      const scalar_t* grad, int64_t grad_step, int64_t n, acc_t<scalar_t>* sums,
                                      int k) {
  enum { chains = kWordBytes / 16 };
  vec<scalar_t> sum[chains][taps] = {};
  const scalar_t* from[taps];
  for (int t = 0; t < taps; ++t) from[t] = source[t] + c;
  const auto add = [&](int64_t q, int chain) __attribute__((always_inline)) {
    const vec<scalar_t> g = load(grad + q * grad_step, k);
    for (int t = 0; t < taps; ++t) sum[chain][t] += load(from[t] + q * source_step, k) * g;
  };
  int64_t q = 0;
  for (; q + chains <= n; q += chains)
    for (int chain = 0; chain < chains; ++chain) add(q + chain, chain);
  for (; q < n; ++q) add(q, 0);
  for (int t = 0; t < taps; ++t) {
    vec<scalar_t> total = sum[0][t];
    for (int chain = 1; chain < chains; ++chain) total += sum[chain][t];
    store(sums + at[t], load(sums + at[t], k) + total, k);
  }
}

// sums[at[t] + c] += Σ_q source[t][q·source_step + c]·grad[q·channels + c],  0 ≤ q < n
template <typename scalar_t>
void depthwise_sums(const scalar_t* const* source, const int64_t* at, int64_t taps, int64_t source_step,
                    const scalar_t* grad, int64_t n, int64_t channels, acc_t<scalar_t>* sums) {
  for_each_channel_vector<scalar_t>(channels, [=](int64_t c, int k) __attribute__((always_inline)) {
    const auto some = [=]<int count>(int64_t t) __attribute__((always_inline)) {
      depthwise_tap_sums<count>(source + t, at + t, c, source_step, grad + c, channels, n, sums + c, k);
    };
    int64_t t = 0;
    for (; t + 3 <= taps; t += 3) some.template operator()<3>(t);
    for (; t < taps; ++t) some.template operator()<1>(t);
  });
}
