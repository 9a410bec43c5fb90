// A batch normalisation's buffers after a training step, in place: one small loop instead of a dozen tensor operations.
#include <ATen/Dispatch.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include "conv_bn.h"

namespace convbn {

using at::Tensor;

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
  const std::vector<double> shift = bias ? to_vector(*bias) : std::vector<double>(running.size(0), 0.0);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, running.scalar_type(), "update_running_statistics", [&] {
    auto values = running.accessor<scalar_t, 1>();
    auto target = batch.accessor<double, 1>();
    for (int64_t c = 0; c < running.size(0); ++c) {
      const double old = values[c], now = factor * target[c] + shift[c];
      values[c] = static_cast<scalar_t>(old + momentum * (now - old));
    }
  });
  running.unsafeGetTensorImpl()->bump_version();
}

// Batch statistics into running ones: the variance unbiased, the convolution's bias back in the mean; one batch more.
// A forward pass inside a backward pass is a checkpoint's second one: the statistics have moved already.
void update_running_statistics(const OptionalTensor& running_mean, const OptionalTensor& running_var,
                               const OptionalTensor& num_batches_tracked, const Tensor& mean, const Tensor& var,
                               const OptionalTensor& bias, int64_t count, double momentum) {
  if (torch::autograd::get_current_graph_task_id() != -1) return;
  const double unbiased = static_cast<double>(count) / static_cast<double>(count - 1);
  if (running_mean) move_running(*running_mean, mean, 1.0, bias, momentum);
  if (running_var) move_running(*running_var, var, unbiased, std::nullopt, momentum);
  if (!num_batches_tracked) return;
  if (num_batches_tracked->is_cpu() && num_batches_tracked->scalar_type() == at::kLong) {
    ++*num_batches_tracked->mutable_data_ptr<int64_t>();
    num_batches_tracked->unsafeGetTensorImpl()->bump_version();
  } else {
    num_batches_tracked->add_(1);
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(convbn_ext, CompositeExplicitAutograd, m) {
  m.impl("update_running_statistics", &update_running_statistics);
}

}  // namespace convbn
