// A batch normalisation's buffers after a training step, in place: one small loop instead of a dozen tensor operations.
#include <ATen/Dispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include <algorithm>
#include <initializer_list>

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

// Whether everything lies on mean's GPU, dense.
bool in_one_launch(std::initializer_list<OptionalTensor> tensors, const OptionalTensor& num_batches_tracked,
                   const Tensor& mean) {
  return mean.is_cuda() && (!num_batches_tracked || num_batches_tracked->scalar_type() == at::kLong) &&
         std::all_of(tensors.begin(), tensors.end(),
                     [&](const auto& t) { return !t || (t->device() == mean.device() && t->is_contiguous()); });
}

// Batch statistics into running ones: the variance unbiased, the convolution's bias back in the mean; one batch more.
// A forward pass inside a backward pass is a checkpoint's second one: the statistics have moved already.
void update_running_statistics(const OptionalTensor& running_mean, const OptionalTensor& running_var,
                               const OptionalTensor& num_batches_tracked, const Tensor& mean, const Tensor& var,
                               const OptionalTensor& bias, int64_t count, double momentum) {
  if (torch::autograd::get_current_graph_task_id() != -1) return;
  const double unbiased = static_cast<double>(count) / static_cast<double>(count - 1);
  if (in_one_launch({running_mean, running_var, num_batches_tracked, bias}, num_batches_tracked, mean)) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("convbn_ext::bn_move_running", "")
                               .typed<void(const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                                           const Tensor&, const Tensor&, const OptionalTensor&, double, double)>();
    op.call(running_mean, running_var, num_batches_tracked, mean, var, bias, unbiased, momentum);
    for (const auto& moved : {running_mean, running_var, num_batches_tracked})
      if (moved) moved->unsafeGetTensorImpl()->bump_version();
    return;
  }
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
