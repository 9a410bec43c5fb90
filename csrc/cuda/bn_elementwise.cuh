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

// The parameters of a pack's lanes: one channel per lane, or one for all.
template <bool per_lane, class Parameters>
struct Lanes {
  const Parameters* parameters;
  __device__ __forceinline__ const Parameters& operator()(int lane) const { return parameters[per_lane ? lane : 0]; }
};

// Calls body(Lanes, offset, count) for every pack of the matrix; make(channel) gives the Parameters.
template <bool channels_last, int V, class Parameters, class Make, class Body>
__device__ __forceinline__ void for_each_pack(const Matrix& m, Make make, Body body) {
  const int x = (blockIdx.x * blockDim.x + threadIdx.x) * V, step_x = gridDim.x * blockDim.x * V;
  const int64_t y = int64_t{blockIdx.y} * blockDim.y + threadIdx.y, step_y = int64_t{gridDim.y} * blockDim.y;
  if constexpr (channels_last) {
    for (int column = x; column < m.width; column += step_x) {
      Parameters parameters[V];
#pragma unroll
      for (int l = 0; l < V; ++l) parameters[l] = make((column + l) % m.channels);
      for (int64_t row = y; row < m.rows; row += step_y) {
        const int64_t offset = row * m.width + column;
        if (offset < m.size) body(Lanes<true, Parameters>{parameters}, offset, pack_count<V>(m, offset));
      }
    }
  } else {
    for (int64_t row = y; row < m.rows; row += step_y) {
      const Parameters parameters = make(static_cast<int>(row) % m.channels);
      for (int column = x; column < m.width; column += step_x) {
        body(Lanes<false, Parameters>{&parameters}, row * m.width + column, V);
      }
    }
  }
}

template <bool channels_last, class Act, typename scalar_t, int V>
__global__ void __launch_bounds__(kThreads, kResident<scalar_t>) bn_apply_kernel(BnProblem p, Matrix m, scalar_t* out) {
  using acc = acc_t<scalar_t>;
  const auto* y = static_cast<const scalar_t*>(p.y);
  const auto* residual = static_cast<const scalar_t*>(p.residual);
  const acc slope = static_cast<acc>(p.slope);
  for_each_pack<channels_last, V, Affine<acc>>(
      m, [&](int c) { return Affine<acc>(p, c); },
      [&](auto bn, int64_t offset, int count) {
        acc v[V], r[V] = {};
        load_pack<V>(y + offset, count, v);
        if (residual) load_pack<V>(residual + offset, count, r);
#pragma unroll
        for (int l = 0; l < V; ++l) v[l] = Act::value((v[l] - bn(l).mean) * bn(l).scale + bn(l).bias + r[l], slope);
        store_pack<V>(out + offset, count, v);
      });
}

// d = y − μ (rounded) and g = grad·act′(v) of one pack.
template <class Act, typename scalar_t, int V, class Bn>
__device__ __forceinline__ void masked_gradient(const BnProblem& p, Bn bn, int64_t offset, int count,
                                                acc_t<scalar_t> (&d)[V], acc_t<scalar_t> (&g)[V]) {
  using acc = acc_t<scalar_t>;
  const auto* out = static_cast<const scalar_t*>(p.out);
  const auto* residual = static_cast<const scalar_t*>(p.residual);
  const acc slope = static_cast<acc>(p.slope);
  load_pack<V>(static_cast<const scalar_t*>(p.y) + offset, count, d);
  load_pack<V>(static_cast<const scalar_t*>(p.grad) + offset, count, g);
  constexpr bool needs_value = !std::is_same_v<Act, Identity>;
  acc v[V] = {};
  if (needs_value && out) {
    load_pack<V>(out + offset, count, v);
  } else if (needs_value && residual) {
    load_pack<V>(residual + offset, count, v);
  }
#pragma unroll
  for (int l = 0; l < V; ++l) {
    d[l] -= bn(l).mean;
    if (needs_value) g[l] = Act::gradient(out ? v[l] : d[l] * bn(l).scale + bn(l).bias + v[l], g[l], slope);
  }
}

template <typename acc>
struct BackwardAffine : Affine<acc> {
  acc a, b, c;

  BackwardAffine() = default;
  __device__ __forceinline__ BackwardAffine(const BnProblem& p, const double* a_, const double* b_, const double* c_,
                                            int channel)
      : Affine<acc>(p, channel) {
    a = static_cast<acc>(a_[channel]);
    b = static_cast<acc>(b_[channel]);
    c = static_cast<acc>(c_[channel] + b_[channel] * (this->mean - p.mean[channel]));
  }
};

template <bool channels_last, class Act, typename scalar_t, int V>
__global__ void __launch_bounds__(kThreads, kResident<scalar_t>)
    bn_backward_apply_kernel(BnProblem p, Matrix m, const double* a, const double* b, const double* c, scalar_t* grad_y,
                             scalar_t* grad_residual) {
  using acc = acc_t<scalar_t>;
  for_each_pack<channels_last, V, BackwardAffine<acc>>(
      m, [&](int channel) { return BackwardAffine<acc>(p, a, b, c, channel); },
      [&](auto bn, int64_t offset, int count) {
        acc d[V], g[V];
        masked_gradient<Act, scalar_t, V>(p, bn, offset, count, d, g);
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
  for_each_pack<channels_last, V, Affine<acc>>(
      m, [&](int c) { return Affine<acc>(p, c); },
      [&](auto bn, int64_t offset, int count) {
        acc v[V], r[V] = {};
        load_pack<V>(out + offset, count, v);
        if (residual) load_pack<V>(residual + offset, count, r);
#pragma unroll
        for (int l = 0; l < V; ++l) {
          v[l] = ((v[l] > 0 ? v[l] : v[l] * inverse_slope) - r[l] - bn(l).bias) / bn(l).scale + bn(l).mean;
        }
        store_pack<V>(y + offset, count, v);
      });
}

}  // namespace convbn
