// The verbs of krylov.h, sent to the backend of their tensors.
#include "krylov.h"

#include <ATen/core/dispatch/Dispatcher.h>

namespace convbn::krylov {
namespace {

template <class Signature>
auto verb(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace

at::Tensor orthonormalize(at::TensorList V, const at::Tensor& rows, int64_t k, const at::Tensor& w) {
  using Signature = at::Tensor(at::TensorList, const at::Tensor&, int64_t, const at::Tensor&);
  static const auto op = verb<Signature>("convbn_ext::krylov_orthonormalize");
  return op.call(V, rows, k, w);
}

at::Tensor combine(at::TensorList V, const at::Tensor& rows, const at::Tensor& y) {
  using Signature = at::Tensor(at::TensorList, const at::Tensor&, const at::Tensor&);
  static const auto op = verb<Signature>("convbn_ext::krylov_combine");
  return op.call(V, rows, y);
}

at::Tensor norms(const at::Tensor& x) {
  static const auto op = verb<at::Tensor(const at::Tensor&)>("convbn_ext::krylov_norms");
  return op.call(x);
}

}  // namespace convbn::krylov
