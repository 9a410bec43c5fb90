// The launchers of csrc/cuda/bn.h for Python. Arguments in the order of harness.py's bn_problem.
#include "api.h"
#include "bn.h"

namespace {

convbn::BnProblem problem(int64_t scalar, int64_t channels_last, int64_t outer, int64_t channels, int64_t inner,
                          int64_t activation, double slope, const void* y, const void* residual, const void* grad,
                          const void* out, const double* mean, const double* scale, const double* bias) {
  return {static_cast<convbn::Scalar>(scalar),
          channels_last != 0,
          outer,
          channels,
          inner,
          static_cast<convbn::Activation>(activation),
          slope,
          y,
          residual,
          grad,
          out,
          mean,
          scale,
          bias};
}

}  // namespace

#define BN_PARAMETERS                                                                                           \
  int64_t scalar, int64_t channels_last, int64_t outer, int64_t channels, int64_t inner, int64_t activation,    \
      double slope, const void *y, const void *residual, const void *grad, const void *out, const double *mean, \
      const double *scale, const double *bias
#define BN_PROBLEM \
  problem(scalar, channels_last, outer, channels, inner, activation, slope, y, residual, grad, out, mean, scale, bias)

SIMT_API int64_t bn_scratch_size(BN_PARAMETERS) { return convbn::bn_scratch_size(BN_PROBLEM); }
SIMT_API void bn_statistics(BN_PARAMETERS, double* scratch, double* result_mean, double* result_var) {
  convbn::launch_bn_statistics(BN_PROBLEM, scratch, result_mean, result_var, nullptr);
}
SIMT_API void bn_apply(BN_PARAMETERS, void* result) { convbn::launch_bn_apply(BN_PROBLEM, result, nullptr); }
SIMT_API void bn_backward_reduce(BN_PARAMETERS, double* scratch, double* sum_g, double* sum_gd) {
  convbn::launch_bn_backward_reduce(BN_PROBLEM, scratch, sum_g, sum_gd, nullptr);
}
SIMT_API void bn_backward_apply(BN_PARAMETERS, const double* a, const double* b, const double* c, void* grad_y,
                                void* grad_residual) {
  convbn::launch_bn_backward_apply(BN_PROBLEM, a, b, c, grad_y, grad_residual, nullptr);
}
SIMT_API void bn_invert(BN_PARAMETERS, void* result) { convbn::launch_bn_invert(BN_PROBLEM, result, nullptr); }

// Vectors as (pointer, scalar).
SIMT_API void bn_affine(int64_t channels, const double* var, const void* weight, const void* bias, int64_t scalar,
                        double eps, double* scale, double* shift) {
  const auto s = static_cast<convbn::Scalar>(scalar);
  convbn::launch_bn_affine(static_cast<int>(channels), var, {weight, s}, {bias, s}, eps, scale, shift, nullptr);
}
SIMT_API void bn_parameter_gradients(int64_t channels, const double* sum_g, const double* sum_gd, const double* scale,
                                     const double* var, double eps, double count, void* grad_weight, void* grad_bias,
                                     int64_t scalar, double* b, double* c) {
  const auto s = static_cast<convbn::Scalar>(scalar);
  convbn::launch_bn_parameter_gradients(static_cast<int>(channels), sum_g, sum_gd, scale, var, eps, count,
                                        {grad_weight, s}, {grad_bias, s}, b, c, nullptr);
}
SIMT_API void bn_move_running(int64_t channels, const double* mean, const double* var, double unbiased,
                              const void* bias, double momentum, void* running_mean, void* running_var, int64_t scalar,
                              int64_t* batches) {
  const auto s = static_cast<convbn::Scalar>(scalar);
  convbn::launch_bn_move_running(static_cast<int>(channels), mean, var, unbiased, {bias, s}, momentum,
                                 {running_mean, s}, {running_var, s}, batches, nullptr);
}
