// Launcher of backward_apply.
#include "bn_elementwise.cuh"
#include "bn_launch.cuh"

namespace convbn {

void launch_bn_backward_apply(const BnProblem& p, const double* a, const double* b, const double* c, void* grad_y,
                              void* grad_residual, CUstream_st* stream) {
  elementwise(p, {grad_y, grad_residual},
              [&]<typename scalar_t>(auto channels_last, scalar_t, auto V, const Matrix& m, dim3 grid, dim3 block) {
                with_activation(p.activation, [&]<class Act>(Act) {
                  CONVBN_LAUNCH((bn_backward_apply_kernel<channels_last, Act, scalar_t, V>), grid, block, 0, stream, p,
                                m, a, b, c, static_cast<scalar_t*>(grad_y), static_cast<scalar_t*>(grad_residual));
                });
              });
}

}  // namespace convbn
