// gmres for Python: callables as linear maps, the options as keywords, the result as a read-only object.
// The loop runs without the GIL; it is taken for Python callables and, now and then, to look for ctrl-C.
#include <torch/csrc/utils/pybind.h>

#include <memory>
#include <string>
#include <utility>

#include "gmres.h"
#include "interrupt.h"

namespace convbn {
namespace {

namespace py = pybind11;
using at::Tensor;

// A pair of Python callables (B, n) → (B, m) and back; without the second there is no adjoint.
struct CallableMap final : LinearMap {
  CallableMap(py::function apply, py::object adjoint) : apply_(std::move(apply)), adjoint_(std::move(adjoint)) {}

  Tensor apply(const Tensor& v) const override {
    const py::gil_scoped_acquire gil;
    return rows_of(v, apply_(v).cast<Tensor>());
  }

  Tensor apply_adjoint(const Tensor& u) const override {
    const py::gil_scoped_acquire gil;
    TORCH_CHECK_VALUE(!adjoint_.is_none(), "CallableMap: no adjoint was given");
    return rows_of(u, adjoint_(u).cast<Tensor>());
  }

  static Tensor rows_of(const Tensor& v, Tensor result) {
    TORCH_CHECK_VALUE(result.dim() == 2 && result.size(0) == v.size(0),
                      "CallableMap: the callable must map (B, n) to (B, m), got ", v.sizes(), " -> ", result.sizes());
    TORCH_CHECK_TYPE(result.scalar_type() == v.scalar_type(), "CallableMap: the callable must keep the dtype ",
                     v.dtype(), ", got ", result.dtype());
    return result;
  }

  py::function apply_;
  py::object adjoint_;
};

using Solver = decltype(&gmres);

template <Solver solver>
GmresResult from_python(const LinearMap& A, const Tensor& b, const std::optional<Tensor>& x0, const LinearMap* M,
                        double rtol, double atol, int64_t restart, int64_t maxiter, int64_t max_cycles,
                        int64_t max_basis_bytes, bool flexible, double least_reduction,
                        std::optional<at::ScalarType> inner_dtype, const py::object& on_step,
                        const py::object& on_cycle) {
  GmresOptions options{rtol,       atol, restart, maxiter, max_cycles, max_basis_bytes, flexible, least_reduction,
                       inner_dtype};
  InterruptCheck interrupt;
  options.interrupt = [&] { interrupt(); };
  if (!on_step.is_none())
    options.on_step = [&](const auto& norms, const auto& vectors) {
      const py::gil_scoped_acquire gil;
      on_step(norms(), py::cpp_function(vectors));
    };
  if (!on_cycle.is_none())
    options.on_cycle = [&](const Tensor& x) {
      const py::gil_scoped_acquire gil;
      on_cycle(x);
    };
  const py::gil_scoped_release no_gil;
  return solver(A, b, x0, M, options);
}

template <Solver solver>
void define(py::module_& m, const char* function, const char* doc) {
  const GmresOptions defaults;
  m.def(function, &from_python<solver>, doc, py::arg("A"), py::arg("b"), py::arg("x0") = py::none(),
        py::arg("M") = py::none(), py::kw_only(), py::arg("rtol") = defaults.rtol, py::arg("atol") = defaults.atol,
        py::arg("restart") = defaults.restart, py::arg("maxiter") = defaults.maxiter,
        py::arg("max_cycles") = defaults.max_cycles, py::arg("max_basis_bytes") = defaults.max_basis_bytes,
        py::arg("flexible") = defaults.flexible, py::arg("least_reduction") = defaults.least_reduction,
        py::arg("inner_dtype") = py::none(), py::arg("on_step") = py::none(), py::arg("on_cycle") = py::none());
}

}  // namespace

void bind_gmres(py::module_& m) {
  py::class_<CallableMap, LinearMap, std::shared_ptr<CallableMap>>(m, "CallableMap")
      .def(py::init<py::function, py::object>(), py::arg("apply"), py::arg("apply_adjoint") = py::none());

  py::class_<GmresResult>(m, "GmresResult", "What GMRES found; see csrc/gmres.h")
      .def_readonly("x", &GmresResult::x)
      .def_property_readonly("status",
                             [](const GmresResult& r) {
                               std::vector<std::string> names;
                               for (const Status s : r.status) names.emplace_back(name(s));
                               return names;
                             })
      .def_readonly("iterations", &GmresResult::iterations)
      .def_readonly("residual", &GmresResult::residual)
      .def_readonly("history", &GmresResult::history)
      .def_readonly("cycles", &GmresResult::cycles)
      .def_readonly("restart", &GmresResult::restart)
      .def_readonly("basis_limited", &GmresResult::basis_limited);

  define<gmres>(m, "gmres", "Restarted, right-preconditioned GMRES for a batch of systems; see csrc/gmres.h");
  define<device_gmres>(m, "device_gmres", "gmres with the decisions of a cycle on the device; see csrc/gmres.h");
  define<device_block_gmres>(m, "device_block_gmres", "block_gmres with the decisions of a cycle on the device");
  define<block_gmres>(m, "block_gmres", "GMRES over one Krylov space for all systems; see csrc/gmres.h");
}

}  // namespace convbn
