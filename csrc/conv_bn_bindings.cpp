// Two operators for Python without torch.ops: the same entries of the dispatcher, but arguments in registers and not
// boxed by their schema, which costs a small layer more than its arithmetic.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/utils/pybind.h>

#include <string>

#include "conv_bn.h"

namespace convbn {

namespace {

namespace py = pybind11;

// What a call keeps of an argument that the operator takes by reference.
template <class T>
struct kept {
  using type = std::decay_t<T>;
};
template <>
struct kept<at::IntArrayRef> {
  using type = std::vector<int64_t>;
};
template <>
struct kept<c10::SymInt> {
  using type = int64_t;
};

template <class Result, class... Args>
void expose(py::module_& m, const std::string& name, Result (*)(Args...)) {
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(("convbn_ext::" + name).c_str(), "");
  m.def(
      name.c_str(),
      [op = op.typed<Result(Args...)>()](const typename kept<Args>::type&... args) { return op.call(args...); },
      py::call_guard<py::gil_scoped_release>());
}

template <class Op>
constexpr Op* signature = nullptr;

}  // namespace

void bind_conv_bn(py::module_& m) {
  expose(m, "conv_bn_forward", signature<ConvBnForwardOp>);
  expose(m, "update_running_statistics", signature<UpdateRunningStatisticsOp>);
}

}  // namespace convbn
