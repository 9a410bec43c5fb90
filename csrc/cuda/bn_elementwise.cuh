// One pass over the tensors, per-channel parameters in registers:
//   apply           out = act((y − μ)·scale + bias + residual)         reads y (residual), writes out
//   backward_apply  grad_y = a·g + b·(y − μ) + c,  grad_residual = g   reads y, grad (residual or out), writes grad_y
//   invert          y = (act⁻¹(out) − residual − bias)/scale + μ       reads out (residual), writes y
// Each thread owns one column of packs and walks down the rows (channels_last: its V channels stay in registers), or,
// contiguous, walks along a row, whose one channel stays in registers. out may be y.
#pragma once
#include "activation.cuh"
#include "bn_layout.cuh"

namespace convbn {

// `packs` whole packs at the offsets that next() gives: `together` of them are loaded before the first is used, so that
// their latencies pass at once.
template <int together, class Next, class Load, class Use>
__device__ __forceinline__ void walk(int64_t packs, Next next, Load load, Use use) {
  for (; packs > 0; packs -= together) {
    int64_t offset[together];
    decltype(load(int64_t{})) loaded[together] = {};
#pragma unroll
    for (int u = 0; u < together; ++u) {
      offset[u] = next();
      if (u < packs) loaded[u] = load(offset[u]);
    }
#pragma unroll
    for (int u = 0; u < together; ++u) {
      if (u < packs) use(offset[u], loaded[u]);
    }
  }
}

// The rows of channels_last at column `first` that a thread takes: y, y + step, … Calls whole(packs, next) for those
// that are full, and cut(offset) for the last one where it is cut short.
template <class Whole, class Cut>
__device__ __forceinline__ void walk_rows(const Matrix& m, int first, int64_t y, int64_t step, Whole whole, Cut cut) {
  const int64_t rows = m.size / m.width, rest = rows * m.width + first;
  int64_t offset = y * m.width + first - step * m.width;
  whole(y < rows ? (rows - y + step - 1) / step : 0, [&] { return offset += step * m.width; });
  if (rest < m.size && rows % step == y) cut(rest);
}

// load(offset, count) and store(lanes, offset, count, loaded) for every pack of the matrix; make(channel) gives the
// Parameters.
template <bool channels_last, int V, int together, class Parameters, class Make, class Load, class Store>
__device__ __forceinline__ void for_each_pack(const Matrix& m, Make make, Load load, Store store) {
  const int64_t y = int64_t{blockIdx.y} * blockDim.y + threadIdx.y, step_y = int64_t{gridDim.y} * blockDim.y;
  const auto load_whole = [&](int64_t offset) { return load(offset, V); };
  if constexpr (channels_last) {
    const int first = blockIdx.x * blockDim.x * V, column = first + threadIdx.x * V;
    const auto lanes = lanes_of_columns<V, Parameters>(m, first, make);
    if (column >= m.width) return;
    walk_rows(
        m, column, y, step_y,
        [&](int64_t packs, auto next) {
          walk<together>(packs, next, load_whole,
                         [&](int64_t offset, const auto& loaded) { store(lanes, offset, V, loaded); });
        },
        [&](int64_t offset) {
          const int count = pack_count<V>(m, offset);
          store(lanes, offset, count, load(offset, count));
        });
  } else {
    const int x = blockIdx.x * blockDim.x + threadIdx.x, step_x = gridDim.x * blockDim.x, packs = m.width / V;
    if (x >= packs) return;
    for (int64_t row = y; row < m.rows; row += step_y) {
      const Lanes<1, Parameters> lanes{make(static_cast<int>(row) % m.channels)};
      int64_t offset = row * m.width + int64_t{x - step_x} * V;
      walk<together>((packs - x + step_x - 1) / step_x, [&] { return offset += step_x * V; }, load_whole,
                     [&](int64_t offset, const auto& loaded) { store(lanes, offset, V, loaded); });
    }
  }
}

template <bool channels_last, class Act, typename scalar_t, int V>
__global__ void __launch_bounds__(kThreads, kResident<scalar_t>) bn_apply_kernel(BnProblem p, Matrix m, scalar_t* out) {
  using acc = acc_t<scalar_t>;
  const auto* y = static_cast<const scalar_t*>(p.y);
  const auto* residual = static_cast<const scalar_t*>(p.residual);
  const acc slope = static_cast<acc>(p.slope);
  struct Loaded {
    Pack<scalar_t, V> y, residual;
  };
  for_each_pack<channels_last, V, 4, Affine<acc>>(
      m, [&](int c) { return Affine<acc>(p, c); },
      [&](int64_t offset, int count) {
        Loaded loaded{};
        loaded.y = read_pack<V>(y + offset, count);
        if (residual) loaded.residual = read_pack<V>(residual + offset, count);
        return loaded;
      },
      [&](const auto& bn, int64_t offset, int count, const Loaded& loaded) {
        acc v[V], r[V] = {};
        unpack<V>(loaded.y, v);
        if (residual) unpack<V>(loaded.residual, r);
#pragma unroll
        for (int l = 0; l < V; ++l) v[l] = Act::value((v[l] - bn(l).mean) * bn(l).scale + bn(l).bias + r[l], slope);
        store_pack<V>(out + offset, count, v);
      });
}

// y, grad and what tells the activation's sign, of one pack; d = y − μ (rounded) and g = grad·act′(v) made of them.
template <class Act, typename scalar_t, int V>
struct Gradient {
  using acc = acc_t<scalar_t>;
  static constexpr bool kNeedsValue = !std::is_same_v<Act, Identity>;
  Pack<scalar_t, V> y, grad, more;

  static __device__ __forceinline__ Gradient load(const BnProblem& p, int64_t offset, int count) {
    Gradient loaded{};
    loaded.y = read_pack<V>(static_cast<const scalar_t*>(p.y) + offset, count);
    loaded.grad = read_pack<V>(static_cast<const scalar_t*>(p.grad) + offset, count);
    const auto* more = static_cast<const scalar_t*>(p.out ? p.out : p.residual);
    if (kNeedsValue && more) loaded.more = read_pack<V>(more + offset, count);
    return loaded;
  }

  template <class Lanes>
  __device__ __forceinline__ void masked(const BnProblem& p, const Lanes& bn, acc (&d)[V], acc (&g)[V]) const {
    const acc slope = static_cast<acc>(p.slope);
    acc v[V] = {};
    unpack<V>(y, d);
    unpack<V>(grad, g);
    if (kNeedsValue && (p.out || p.residual)) unpack<V>(more, v);
#pragma unroll
    for (int l = 0; l < V; ++l) {
      d[l] -= bn(l).mean;
      if (kNeedsValue) g[l] = Act::gradient(p.out ? v[l] : d[l] * bn(l).scale + bn(l).bias + v[l], g[l], slope);
    }
  }
};

template <typename acc>
struct BackwardAffine : Affine<acc> {
  static constexpr int kFields = 6;
  acc a, b, c;

  BackwardAffine() = default;
  __device__ __forceinline__ BackwardAffine(const BnProblem& p, const double* a_, const double* b_, const double* c_,
                                            int channel)
      : Affine<acc>(p, channel) {
    a = static_cast<acc>(a_[channel]);
    b = static_cast<acc>(b_[channel]);
    c = static_cast<acc>(c_[channel] + b_[channel] * (this->mean - p.mean[channel]));
  }
  __device__ __forceinline__ acc& field(int i) {
    return i < Affine<acc>::kFields ? Affine<acc>::field(i) : i == 3 ? a : i == 4 ? b : c;
  }
};

template <bool channels_last, class Act, typename scalar_t, int V>
__global__ void __launch_bounds__(kThreads, kResident<scalar_t>)
    bn_backward_apply_kernel(BnProblem p, Matrix m, const double* a, const double* b, const double* c, scalar_t* grad_y,
                             scalar_t* grad_residual) {
  using acc = acc_t<scalar_t>;
  using Loaded = Gradient<Act, scalar_t, V>;
  for_each_pack<channels_last, V, 1, BackwardAffine<acc>>(
      m, [&](int channel) { return BackwardAffine<acc>(p, a, b, c, channel); },
      [&](int64_t offset, int count) { return Loaded::load(p, offset, count); },
      [&](const auto& bn, int64_t offset, int count, const Loaded& loaded) {
        acc d[V], g[V];
        loaded.masked(p, bn, d, g);
        if (grad_residual) store_pack<V>(grad_residual + offset, count, g);
        if (!grad_y) return;
#pragma unroll
        for (int l = 0; l < V; ++l) d[l] = bn(l).a * g[l] + bn(l).b * d[l] + bn(l).c;
        store_pack<V>(grad_y + offset, count, d);
      });
}

// slope is 1 for the identity.
template <bool channels_last, typename scalar_t, int V>
__global__ void __launch_bounds__(kThreads, kResident<scalar_t>) bn_invert_kernel(BnProblem p, Matrix m, scalar_t* y) {
  using acc = acc_t<scalar_t>;
  const auto* out = static_cast<const scalar_t*>(p.out);
  const auto* residual = static_cast<const scalar_t*>(p.residual);
  const acc inverse_slope = static_cast<acc>(1 / p.slope);
  struct Loaded {
    Pack<scalar_t, V> out, residual;
  };
  for_each_pack<channels_last, V, 2, Affine<acc>>(
      m, [&](int c) { return Affine<acc>(p, c); },
      [&](int64_t offset, int count) {
        Loaded loaded{};
        loaded.out = read_pack<V>(out + offset, count);
        if (residual) loaded.residual = read_pack<V>(residual + offset, count);
        return loaded;
      },
      [&](const auto& bn, int64_t offset, int count, const Loaded& loaded) {
        acc v[V], r[V] = {};
        unpack<V>(loaded.out, v);
        if (residual) unpack<V>(loaded.residual, r);
#pragma unroll
        for (int l = 0; l < V; ++l) {
          v[l] = ((v[l] > 0 ? v[l] : v[l] * inverse_slope) - r[l] - bn(l).bias) / bn(l).scale + bn(l).mean;
        }
        store_pack<V>(y + offset, count, v);
      });
}

}  // namespace convbn
