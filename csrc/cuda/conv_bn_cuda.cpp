// The torch side of conv_bn on CUDA. The convolution is torch's or our own: implicit_gemm.h.
#include <torch/library.h>

#include "../batch_norm.h"
#include "bn_tensors.h"
#include "implicit_gemm.h"

namespace convbn {

namespace {

using at::Tensor;

struct CudaKernels {
  static std::tuple<Tensor, Tensor> statistics(const Tensor& y) {
    Launch launch(y);
    launch.problem.y = data(y);
    const Tensor scratch = launch.vector(y, bn_scratch_size(launch.problem));
    const Tensor mean = launch.vector(y, y.size(1)), var = launch.vector(y, y.size(1));
    launch_bn_statistics(launch.problem, scratch.mutable_data_ptr<double>(), mean.mutable_data_ptr<double>(),
                         var.mutable_data_ptr<double>(), launch.stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return {mean, var};
  }

  static void apply(const BnForward& bn, const Tensor& out) {
    Launch launch(bn, bn.y);
    launch.problem.y = data(bn.y);
    launch_bn_apply(launch.problem, mutable_data(out), launch.stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

  static std::tuple<Tensor, Tensor> backward_reduce(const BnBackward& bn) {
    if (bn.y.numel() == 0) return {at::zeros_like(bn.mean), at::zeros_like(bn.mean)};
    Launch launch(bn);
    const Tensor scratch = launch.vector(bn.y, bn_scratch_size(launch.problem));
    const Tensor sum_g = launch.vector(bn.y, bn.y.size(1)), sum_gd = launch.vector(bn.y, bn.y.size(1));
    launch_bn_backward_reduce(launch.problem, scratch.mutable_data_ptr<double>(), sum_g.mutable_data_ptr<double>(),
                              sum_gd.mutable_data_ptr<double>(), launch.stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return {sum_g, sum_gd};
  }

  static void backward_apply(const BnBackward& bn, const Tensor& a, const Tensor& b, const Tensor& c,
                             const Tensor& grad_y, const Tensor& grad_residual) {
    if (bn.y.numel() == 0) return;
    Launch launch(bn);
    const Tensor a_ = a.contiguous(), b_ = b.contiguous(), c_ = c.contiguous();
    launch_bn_backward_apply(launch.problem, a_.const_data_ptr<double>(), b_.const_data_ptr<double>(),
                             c_.const_data_ptr<double>(), mutable_data(grad_y), mutable_data(grad_residual),
                             launch.stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

  static Tensor invert(const BnForward& bn, const Tensor& out) {
    const Tensor y = at::empty_like(out);
    if (out.numel() == 0) return y;
    Launch launch(bn, out);
    launch.problem.out = data(out);
    launch_bn_invert(launch.problem, mutable_data(y), launch.stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return y;
  }

  static bool own_convolution(const Tensor& input, const Tensor& weight, const ConvGeometry& geometry) {
    return use_implicit_gemm(input, weight, geometry);
  }

  static Tensor convolve(const Tensor& input, const Tensor& weight, const ConvGeometry& geometry, Tensor* mean,
                         Tensor* var) {
    return implicit_gemm(input, weight, geometry, mean, var);
  }

  // The products know sign activations alone; else, and where it is asked for anyway, g is stored once.
  static Tensor prepare_products(BnBackward& bn, bool needs_residual) {
    const bool by_sign = bn.activation == Activation::relu || bn.activation == Activation::leaky_relu;
    const bool sign_known = bn.out.defined() || !bn.residual.defined();
    Tensor g;
    if (needs_residual || (bn.activation != Activation::identity && !(by_sign && sign_known))) {
      g = at::empty_like(bn.y);
      backward_apply(bn, bn.scale, bn.scale, bn.scale, Tensor(), g);
      bn.grad = g;
      bn.activation = Activation::identity;
      bn.out = Tensor();
    }
    bn.residual = Tensor();
    as_products_take(bn);
    return needs_residual ? g : Tensor();
  }

  static std::tuple<Tensor, Tensor, Tensor> backward_reduce_products(const BnBackward& bn, const Tensor& input,
                                                                     const Tensor& weight,
                                                                     const ConvGeometry& geometry) {
    return implicit_gemm_reduce(bn, input, weight, geometry);
  }

  static std::tuple<Tensor, Tensor> backward_convolve(const BnBackward& bn, const Tensor& a, const Tensor& b,
                                                      const Tensor& c, const Tensor& input, const Tensor& weight,
                                                      const ConvGeometry& geometry, const Tensor& products,
                                                      bool needs_input) {
    return implicit_gemm_backward(bn, a, b, c, input, weight, geometry, products, needs_input);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(convbn_ext, CUDA, m) {
  m.impl("conv_bn_forward", &conv_bn_forward<CudaKernels>);
  m.impl("conv_bn_backward", &conv_bn_backward<CudaKernels>);
  m.impl("bn_statistics", &bn_statistics<CudaKernels>);
  m.impl("bn_apply", &bn_apply<CudaKernels>);
  m.impl("bn_backward_reduce", &bn_backward_reduce<CudaKernels>);
  m.impl("bn_backward_apply", &bn_backward_apply<CudaKernels>);
}

}  // namespace convbn
