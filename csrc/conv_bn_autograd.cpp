// First derivatives of conv_bn_forward, on every device: a node of the autograd graph that calls conv_bn_backward.
//
// conv_bn_backward is an operator with a derivative of its own (autograd.py), so second derivatives need nothing here.
// With memory="chain" a node keeps y alone: its input, where that is the output of another such node, is formed again
// from that one's y. A backward pass runs consumers first, so the y that they ask for is still there.
// A plain node, not torch::autograd::Function, which functorch's transforms (grad, vjp, vmap) refuse.
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include "batch_norm.h"

namespace convbn {

namespace {

using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

template <class Op>
auto find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Op>();
}

OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

using NodePtr = decltype(torch::autograd::Edge::function);  // a shared_ptr or, from torch 2.13 on, an intrusive_ptr
struct ConvBnBackward;

// Neither traced nor wrapped: the tensor's values are its own.
bool is_plain(const Tensor& t) {
  const c10::DispatchKeySet wrapped{c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::FuncTorchGradWrapper,
                                    c10::DispatchKey::Functionalize, c10::DispatchKey::Python};
  return t.defined() && !t.key_set().has_any(wrapped) && !c10::impl::TorchDispatchModeTLS::any_modes_set();
}

// A tensor kept for the backward pass, or the node that can form it again.
struct Source {
  SavedVariable tensor;
  NodePtr owner;  // keeps producer alive
  ConvBnBackward* producer = nullptr;

  void keep(const Tensor& t, bool chain);
  Tensor get() const;
  int depth() const;
};

// Edges to input, weight, bias, bn_weight, bn_bias, residual; one gradient comes in, that of out.
struct ConvBnBackward : torch::autograd::Node {
  Source input, residual;
  SavedVariable weight, y, mean, var, bn_weight, bn_bias, out, bias;
  bool training = false;
  std::string memory, padding_mode, activation;
  std::vector<int64_t> stride, padding, dilation;
  int64_t groups = 1;
  double eps = 0, slope = 0;

  std::string name() const override { return "ConvBnBackward"; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* v :
         {&input.tensor, &residual.tensor, &weight, &y, &mean, &var, &bn_weight, &bn_bias, &out, &bias})
      v->reset_data();
  }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    variable_list result(6);
    if (!grads[0].defined()) return result;
    std::array<bool, 6> needs;
    for (size_t i = 0; i < needs.size(); ++i) needs[i] = task_should_compute_output(i);
    const auto [needs_input, needs_weight, needs_bias, needs_bn_weight, needs_bn_bias, needs_residual] = needs;
    const bool through_activation = needs_residual && activation != "identity";
    const Tensor bias_ = bias.unpack();
    Tensor mean_ = mean.unpack();
    if (bias_.defined() && !training && at::GradMode::is_enabled())
      mean_ = mean_ + (bias_.detach() - bias_);  // μ = running_mean − bias, as a function of bias
    const Tensor var_ = var.unpack(), bn_weight_ = bn_weight.unpack();
    const std::array<bool, 5> mask{needs_input, needs_weight, needs_bn_weight,
                                   needs_bn_bias || (needs_bias && !training), through_activation};
    const Tensor y_ = unpack_y();
    const auto differentiate = [&](const c10::TypedOperatorHandle<ConvBnBackwardOp>& op) {
      return op.call(grads[0], input.get(), weight.unpack(), optional(y_), mean_, var_, optional(bn_weight_),
                     optional(bn_bias.unpack()), optional(residual.get()), optional(out.unpack(getptr())), training,
                     keeps_y() ? "save" : memory, stride, padding, dilation, groups, padding_mode, eps, activation,
                     slope, mask);
    };
    static const auto functional = find_operator<ConvBnBackwardOp>("convbn_ext::conv_bn_backward");
    static const auto over_y = find_operator<ConvBnBackwardOp>("convbn_ext::conv_bn_backward_");
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gradients;
    if (at::GradMode::is_enabled()) {
      gradients = differentiate(functional);
    } else {  // nothing differentiates this call, and the autograd layer would only cost time
      const at::AutoDispatchBelowAutograd guard;
      gradients = differentiate(ours_alone(y_) ? over_y : functional);
    }
    const auto& [grad_input, grad_weight, grad_bn_weight, grad_bn_bias, grad_residual] = gradients;
    if (needs_input) result[0] = grad_input;
    if (needs_weight) result[1] = grad_weight;
    if (needs_bias && training) {
      result[2] = at::zeros_like(bias_);  // the mean takes it away again
    } else if (needs_bias) {
      const Tensor scale = at::rsqrt(var_ + eps);
      result[2] = ((bn_weight_.defined() ? scale * bn_weight_ : scale) * grad_bn_bias).to(bias_.scalar_type());
    }
    if (needs_bn_weight) result[3] = grad_bn_weight;
    if (needs_bn_bias) result[4] = grad_bn_bias;
    if (needs_residual) result[5] = through_activation ? grad_residual : grads[0];
    return result;
  }

  bool keeps_y() const { return memory == "save" || memory == "chain"; }

  // How many y beside its own the output is formed from.
  int depth() const { return residual.producer ? 1 + residual.depth() : 0; }

  // The output once more, by the same loop; for second derivatives with its place in the graph.
  Tensor output() {
    static const auto op = find_operator<BnApplyOp>("convbn_ext::bn_apply");
    const std::lock_guard<std::mutex> lock(mutex_);
    const at::AutoDispatchBelowAutograd guard;
    const auto [scale, shift] = bn_affine(var.unpack(), optional(bn_weight.unpack()), optional(bn_bias.unpack()), eps);
    const Tensor result = op.call(y.unpack(), mean.unpack(), scale, shift, optional(residual.get()), activation, slope);
    if (at::GradMode::is_enabled()) torch::autograd::impl::set_gradient_edge(result, {getptr(), 0});
    return result;
  }

 private:
  // The last backward pass through this node takes y out of it.
  Tensor unpack_y() {
    Tensor result = y.unpack();
    if (!torch::autograd::get_current_graph_task_keep_graph()) y.reset_data();
    return result;
  }

  // Whether dy may be written over y: no other pass will come, and nobody else (a hook, a trace) holds the tensor.
  static bool ours_alone(const Tensor& y) {
    return is_plain(y) && y.is_cpu() && y.use_count() == 1 && y.storage().use_count() == 1;
  }
};

constexpr int kDeepest = 2;  // a longer row of residual sums would be formed again for each of its members

void Source::keep(const Tensor& t, bool chain) {
  if (!t.defined()) return;
  if (chain && is_plain(t) && t.grad_fn() && t.output_nr() == 0 && t._version() == 0) {
    auto* node = dynamic_cast<ConvBnBackward*>(t.grad_fn().get());
    if (node && node->memory == "chain" && node->depth() <= kDeepest) {
      producer = node;
      owner = t.grad_fn();
      return;
    }
  }
  tensor = SavedVariable(t, /*is_output=*/false);
}

Tensor Source::get() const { return producer ? producer->output() : tensor.unpack(); }

int Source::depth() const { return producer ? producer->depth() : 0; }

template <class T, class Ptr = NodePtr>
Ptr make_node(T*& node) {
  if constexpr (std::is_constructible_v<Ptr, std::shared_ptr<T>>) {
    std::shared_ptr<T> result(new T, [](T* p) { deleteNode(p); });
    node = result.get();
    return result;
  } else {
    auto result = c10::make_intrusive<T>();
    node = result.get();
    return result;
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv_bn_forward_autograd(
    c10::DispatchKeySet keys, const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
    const OptionalTensor& bn_weight, const OptionalTensor& bn_bias, const OptionalTensor& residual,
    const OptionalTensor& running_mean, const OptionalTensor& running_var, bool training, std::string_view memory,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
    std::string_view padding_mode, double eps, std::string_view activation, double slope) {
  static const auto op = find_operator<ConvBnForwardOp>("convbn_ext::conv_bn_forward");
  const auto or_none = [](const OptionalTensor& t) { return t.value_or(Tensor()); };
  const Tensor bias_ = or_none(bias), bn_weight_ = or_none(bn_weight), bn_bias_ = or_none(bn_bias),
               residual_ = or_none(residual);
  for (const Tensor& t : {input, weight, bias_, bn_weight_, bn_bias_, residual_})
    TORCH_CHECK_NOT_IMPLEMENTED(!torch::autograd::isFwGradDefined(t),
                                "conv_bn: forward-mode derivatives are not available");
  NodePtr pointer;
  ConvBnBackward* node = nullptr;
  if (torch::autograd::compute_requires_grad(input, weight, bias_, bn_weight_, bn_bias_, residual_)) {
    pointer = make_node(node);
    node->set_next_edges(torch::autograd::collect_next_edges(input, weight, bias_, bn_weight_, bn_bias_, residual_));
  }
  auto [out, y, mean, var] = [&] {
    const at::AutoDispatchBelowAutograd guard;
    return op.redispatch(keys & c10::after_autograd_keyset, input, weight, bias, bn_weight, bn_bias, residual,
                         running_mean, running_var, training, memory, stride, padding, dilation, groups, padding_mode,
                         eps, activation, slope);
  }();
  if (node) {
    // x, w, y and per-channel vectors; with residual and activation also out (or the residual itself)
    const bool chain = memory == "chain", invert = memory == "invert",
               needs_sign = residual_.defined() && activation != "identity";
    const bool sign_in_out = activation == "relu" || (activation == "leaky_relu" && slope > 0);
    torch::autograd::set_history(out, pointer);
    const auto save = [](SavedVariable& slot, const Tensor& t) { slot = SavedVariable(t, /*is_output=*/false); };
    node->input.keep(input, chain);
    save(node->weight, weight);
    save(node->bias, bias_);
    save(node->bn_weight, bn_weight_);
    save(node->bn_bias, bn_bias_);
    save(node->mean, mean);
    save(node->var, var);
    // y beside the one that Python gets, whose wrapper would count as an owner for as long as the node lives
    if (chain || memory == "save") save(node->y, y.tensor_data());
    if (chain || invert || (needs_sign && !sign_in_out)) node->residual.keep(residual_, chain);
    if (invert || (!chain && needs_sign && sign_in_out)) node->out = SavedVariable(out, /*is_output=*/true);
    node->training = training;
    node->memory = memory;
    node->stride = stride.vec();
    node->padding = padding.vec();
    node->dilation = dilation.vec();
    node->groups = groups;
    node->padding_mode = padding_mode;
    node->eps = eps;
    node->activation = activation;
    node->slope = slope;
  }
  return {out, y, mean, var};
}

}  // namespace

TORCH_LIBRARY_IMPL(convbn_ext, Autograd, m) { m.impl("conv_bn_forward", TORCH_FN(conv_bn_forward_autograd)); }

}  // namespace convbn
