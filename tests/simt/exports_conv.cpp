// The launchers of csrc/cuda/conv.h for Python. Arguments in the order of test_simt_conv.py's Layer.problem.
#include "api.h"
#include "conv.h"

namespace {

// numbers: scalar, tensor_cores, samples, channels, out_channels, groups, border, then pairs: size, out_size, kernel,
// stride, padding, dilation
convbn::ConvProblem problem(const int64_t* numbers) {
  const auto n = [&](int i) { return static_cast<int>(numbers[i]); };
  convbn::ConvProblem p;
  p.scalar = static_cast<convbn::Scalar>(numbers[0]);
  p.tensor_cores = numbers[1] != 0;
  p.samples = numbers[2];
  p.channels = n(3);
  p.out_channels = n(4);
  p.groups = n(5);
  p.border = static_cast<convbn::PaddingMode>(numbers[6]);
  for (int i = 0; i < 2; ++i) {
    p.size[i] = n(7 + i);
    p.out_size[i] = n(9 + i);
    p.kernel[i] = n(11 + i);
    p.stride[i] = n(13 + i);
    p.padding[i] = n(15 + i);
    p.dilation[i] = n(17 + i);
  }
  return p;
}

convbn::BnProblem bn_problem(const convbn::ConvProblem& p, int64_t activation, double slope, const void* y,
                             const void* grad, const void* out, const double* mean, const double* scale,
                             const double* bias) {
  return {.scalar = p.scalar,
          .channels_last = true,
          .outer = p.samples * p.out_size[0] * p.out_size[1],
          .channels = p.out_channels,
          .inner = 1,
          .activation = static_cast<convbn::Activation>(activation),
          .slope = slope,
          .y = y,
          .grad = grad,
          .out = out,
          .mean = mean,
          .scale = scale,
          .bias = bias};
}

}  // namespace

#define BN_PARAMETERS                                                                                     \
  int64_t activation, double slope, const void *y, const void *grad, const void *out, const double *mean, \
      const double *scale, const double *bias
#define BN bn_problem(problem(numbers), activation, slope, y, grad, out, mean, scale, bias)

SIMT_API int64_t conv_statistics_size(const int64_t* numbers) { return convbn::conv_statistics_size(problem(numbers)); }
SIMT_API int64_t conv_table_size(const int64_t* numbers) { return convbn::conv_table_size(problem(numbers)); }
SIMT_API int64_t conv_grad_weight_size(const int64_t* numbers) {
  return convbn::conv_grad_weight_size(problem(numbers));
}
SIMT_API void conv_forward(const int64_t* numbers, const void* x, const void* weight, void* y, double* scratch) {
  convbn::launch_conv_forward(problem(numbers), x, weight, y, scratch, nullptr);
}
SIMT_API void conv_statistics(const int64_t* numbers, const double* scratch, double* mean, double* var) {
  convbn::launch_conv_statistics(problem(numbers), scratch, mean, var, nullptr);
}
SIMT_API void conv_table(const int64_t* numbers, BN_PARAMETERS, const double* a, const double* b, const double* c,
                         float* table) {
  convbn::launch_conv_table(BN, a, b, c, table, nullptr);
}
SIMT_API void conv_grad_input(const int64_t* numbers, BN_PARAMETERS, const float* table, const void* weight, void* dx) {
  convbn::launch_conv_grad_input(problem(numbers), BN, table, weight, dx, nullptr);
}
SIMT_API void conv_grad_weight(const int64_t* numbers, BN_PARAMETERS, const float* table, const void* x,
                               double* scratch, double* sum_g, double* sum_gd) {
  convbn::launch_conv_grad_weight(problem(numbers), BN, table, x, scratch, sum_g, sum_gd, nullptr);
}
SIMT_API void conv_combine_weight(const int64_t* numbers, BN_PARAMETERS, const double* a, const double* b,
                                  const double* c, double* scratch, void* dw) {
  convbn::launch_conv_combine_weight(problem(numbers), BN, a, b, c, scratch, dw, nullptr);
}
