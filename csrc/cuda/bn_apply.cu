// Launchers of apply and invert.
#include "bn_elementwise.cuh"
#include "bn_launch.cuh"

namespace convbn {

void launch_bn_apply(const BnProblem& p, void* out, CUstream_st* stream) {
  elementwise(p, {out},
              [&]<typename scalar_t>(auto channels_last, scalar_t, auto V, const Matrix& m, dim3 grid, dim3 block) {
                with_activation(p.activation, [&]<class Act>(Act) {
                  CONVBN_LAUNCH((bn_apply_kernel<channels_last, Act, scalar_t, V>), grid, block, 0, stream, p, m,
                                static_cast<scalar_t*>(out));
                });
              });
}

void launch_bn_invert(const BnProblem& problem, void* y, CUstream_st* stream) {
  BnProblem p = problem;
  if (p.activation == Activation::identity) p.slope = 1;
  elementwise(p, {y},
              [&]<typename scalar_t>(auto channels_last, scalar_t, auto V, const Matrix& m, dim3 grid, dim3 block) {
                CONVBN_LAUNCH((bn_invert_kernel<channels_last, scalar_t, V>), grid, block, 0, stream, p, m,
                              static_cast<scalar_t*>(y));
              });
}

}  // namespace convbn
