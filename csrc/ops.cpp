// Every operator of the package on one screen, and the Python module that carries them.
// The backends (cpu/, cuda/) register their own implementations.
#include <torch/extension.h>

namespace convbn {
void bind_gmres(pybind11::module_& m);        // gmres_bindings.cpp
void bind_linear_maps(pybind11::module_& m);  // linear_map.cpp
}

TORCH_LIBRARY(convbn_ext, m)
{
  // krylov.h
  m.def("krylov_orthonormalize(Tensor(a!)[] V, Tensor rows, int k, Tensor w) -> Tensor");
  m.def("krylov_combine(Tensor[] V, Tensor rows, Tensor y) -> Tensor");
  m.def("krylov_norms(Tensor x) -> Tensor");
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Compiled part of convbn_ext";
#ifdef __clang__
  m.attr("compiler") = __VERSION__;  // begins with "Clang"
#else
  m.attr("compiler") = "GCC " __VERSION__;
#endif
  convbn::bind_linear_maps(m);
  convbn::bind_gmres(m);
}
