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

void rotate(const at::Tensor& small, const at::Tensor& H, const at::Tensor& limits, int64_t restart, double eps) {
  using Signature = void(const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t, double);
  static const auto op = verb<Signature>("convbn_ext::krylov_rotate");
  op.call(small, H, limits, restart, eps);
}

at::Tensor solve(const at::Tensor& small, int64_t restart, int64_t K) {
  static const auto op = verb<at::Tensor(const at::Tensor&, int64_t, int64_t)>("convbn_ext::krylov_solve");
  return op.call(small, restart, K);
}

std::tuple<at::Tensor, at::Tensor> cycle(const at::Tensor& r, const at::Tensor& limits, int64_t restart, double eps,
                                         const Convolution& A) {
  using Signature = std::tuple<at::Tensor, at::Tensor>(
      const at::Tensor&, const at::Tensor&, int64_t, double, const at::Tensor&, const std::optional<at::Tensor>&,
      at::IntArrayRef, at::IntArrayRef, at::IntArrayRef, at::IntArrayRef, int64_t, c10::string_view);
  static const auto op = verb<Signature>("convbn_ext::gmres_cycle");
  const auto& g = A.geometry;
  return op.call(r, limits, restart, eps, A.weight, A.row_scale, A.spatial, g.stride, g.padding, g.dilation, g.groups,
                 name(g.mode));
}

bool has_cycle(const at::Tensor& r) {
  const auto key = c10::computeDispatchKey(r.scalar_type(), r.layout(), r.device());
  return c10::Dispatcher::singleton().findSchemaOrThrow("convbn_ext::gmres_cycle", "").hasKernelForDispatchKey(key);
}

}  // namespace convbn::krylov
