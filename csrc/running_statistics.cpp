// running_mean and running_var after a training step, in place: one small loop instead of a dozen tensor operations.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include <optional>

namespace convbn {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

namespace {

// running ← (1 − momentum)·running + momentum·(factor·batch + bias), in place; batch in float64
void move_running(const Tensor& running, const Tensor& batch, double factor, const OptionalTensor& bias,
                  double momentum) {
  if (!running.is_cpu()) {
    Tensor target = batch * factor;
    if (bias) target = target + *bias;
    running.lerp_(target.to(running.scalar_type()), momentum);
    return;
  }
  const Tensor shift = bias ? bias->to(at::kDouble) : Tensor();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, running.scalar_type(), "update_running_statistics", [&] {
    auto values = running.accessor<scalar_t, 1>();
    auto target = batch.accessor<double, 1>();
    for (int64_t c = 0; c < running.size(0); ++c) {
      const double old = values[c], now = factor * target[c] + (bias ? shift.const_data_ptr<double>()[c] : 0.0);
      values[c] = static_cast<scalar_t>(old + momentum * (now - old));
    }
  });
  running.unsafeGetTensorImpl()->bump_version();
}

// Batch statistics into running ones: the variance unbiased, the convolution's bias back in the mean.
// A forward pass inside a backward pass is a checkpoint's second one: the statistics have moved already.
void update_running_statistics(const OptionalTensor& running_mean, const OptionalTensor& running_var,
                               const Tensor& mean, const Tensor& var, const OptionalTensor& bias, int64_t count,
                               double momentum) {
  if (torch::autograd::get_current_graph_task_id() != -1) return;
  const double unbiased = static_cast<double>(count) / static_cast<double>(count - 1);
  if (running_mean) move_running(*running_mean, mean, 1.0, bias, momentum);
  if (running_var) move_running(*running_var, var, unbiased, std::nullopt, momentum);
}

}  // namespace

TORCH_LIBRARY_IMPL(convbn_ext, CompositeExplicitAutograd, m) {
  m.impl("update_running_statistics", &update_running_statistics);
}

}  // namespace convbn
