// Every operator of the package on one screen, and the Python module that carries them.
// The backends (cpu/, cuda/) register their own implementations.
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include "cpu/amx.h"
#include "cpu/pool.h"

namespace convbn {
void bind_block_lu(pybind11::module_& m);           // cpu/block_lu_cpu.cpp
void bind_block_tridiagonal(pybind11::module_& m);  // block_tridiagonal.cpp
void bind_border(pybind11::module_& m);             // border.cpp
void bind_conv_bn(pybind11::module_& m);            // conv_bn_bindings.cpp
void bind_gmres(pybind11::module_& m);              // gmres_bindings.cpp
void bind_linear_maps(pybind11::module_& m);        // linear_map.cpp
void bind_matrix_maps(pybind11::module_& m);        // matrix_map.cpp
}  // namespace convbn

TORCH_LIBRARY(convbn_ext, m) {
  // conv_bn.h; padding is (lo, hi) per spatial axis; what is not asked for comes back empty
  m.def(
      "conv_bn_forward(Tensor input, Tensor weight, Tensor? bias, Tensor? bn_weight, Tensor? bn_bias, "
      "Tensor? residual, Tensor? running_mean, Tensor? running_var, bool training, str memory, int[] stride, "
      "int[] padding, int[] dilation, int groups, str padding_mode, float eps, str activation, float slope) "
      "-> (Tensor out, Tensor y, Tensor mean, Tensor var)");
  m.def(
      "conv_bn_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor? y, Tensor mean, Tensor var, "
      "Tensor? bn_weight, Tensor? bn_bias, Tensor? residual, Tensor? out, bool training, str memory, int[] stride, "
      "int[] padding, int[] dilation, int groups, str padding_mode, float eps, str activation, float slope, "
      "bool[5] output_mask) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bn_weight, Tensor grad_bn_bias, "
      "Tensor grad_residual)");
  m.def(
      "conv_bn_backward_(Tensor grad_output, Tensor input, Tensor weight, Tensor(a!)? y, Tensor mean, Tensor var, "
      "Tensor? bn_weight, Tensor? bn_bias, Tensor? residual, Tensor? out, bool training, str memory, int[] stride, "
      "int[] padding, int[] dilation, int groups, str padding_mode, float eps, str activation, float slope, "
      "bool[5] output_mask) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bn_weight, Tensor grad_bn_bias, "
      "Tensor grad_residual)");
  m.def(
      "update_running_statistics(Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, "
      "Tensor mean, Tensor var, Tensor? bias, SymInt count, float momentum) -> ()");
  // batch_norm.h
  m.def("bn_statistics(Tensor y) -> (Tensor mean, Tensor var)");
  m.def(
      "bn_apply(Tensor y, Tensor mean, Tensor scale, Tensor bias, Tensor? residual, str activation, float slope) "
      "-> Tensor");
  m.def(
      "bn_backward_reduce(Tensor grad, Tensor y, Tensor mean, Tensor scale, Tensor bias, Tensor? residual, "
      "str activation, float slope) -> (Tensor sum_g, Tensor sum_gd)");
  m.def(
      "bn_backward_apply(Tensor grad, Tensor y, Tensor mean, Tensor scale, Tensor bias, Tensor? residual, "
      "str activation, float slope, Tensor a, Tensor b, Tensor c) -> (Tensor grad_y, Tensor grad_residual)");
  // per channel, on devices where a launch costs more than the arithmetic (conv_bn.cpp, running_statistics.cpp)
  m.def("bn_affine(Tensor var, Tensor? bn_weight, Tensor? bn_bias, float eps) -> (Tensor scale, Tensor shift)");
  m.def(
      "bn_parameter_gradients(Tensor sum_g, Tensor sum_gd, Tensor scale, Tensor var, float eps, float count, "
      "ScalarType weight_type, ScalarType bias_type) -> (Tensor grad_weight, Tensor grad_bias, Tensor b, Tensor c)");
  m.def(
      "bn_move_running(Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, "
      "Tensor mean, Tensor var, Tensor? bias, float unbiased, float momentum) -> ()");
  // krylov.h
  m.def("krylov_orthonormalize(Tensor(a!)[] V, Tensor rows, int k, Tensor w) -> Tensor");
  m.def("krylov_combine(Tensor[] V, Tensor rows, Tensor y) -> Tensor");
  m.def("krylov_norms(Tensor x) -> Tensor");
  m.def("krylov_rotate(Tensor(a!) small, Tensor H, Tensor limits, int restart, float eps) -> ()");
  m.def("krylov_solve(Tensor small, int restart, int K) -> Tensor");
  m.def(
      "gmres_cycle(Tensor r, Tensor limits, int restart, float eps, Tensor weight, Tensor? row_scale, int[] spatial, "
      "int[] stride, int[] padding, int[] dilation, int groups, str padding_mode) -> (Tensor u, Tensor small)");
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Compiled part of convbn_ext";
#ifdef __clang__
  m.attr("compiler") = __VERSION__;  // begins with "Clang"
#else
  m.attr("compiler") = "GCC " __VERSION__;
#endif
  m.def("amx_available", &convbn::amx_available);
  m.def("pool_bytes", &convbn::pool_bytes);
  m.def("release_memory", &convbn::pool_release);
  convbn::bind_conv_bn(m);
  convbn::bind_linear_maps(m);
  convbn::bind_matrix_maps(m);
  convbn::bind_block_lu(m);
  convbn::bind_block_tridiagonal(m);
  convbn::bind_border(m);
  convbn::bind_gmres(m);
}
