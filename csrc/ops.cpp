// Every operator of the package on one screen, and the Python module that carries them.
// The backends (cpu/, cuda/) register their own implementations.
#include <torch/extension.h>

namespace convbn {
void bind_linear_maps(pybind11::module_& m);  // linear_map.cpp
}

TORCH_LIBRARY(convbn_ext, m)
{
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Compiled part of convbn_ext";
#ifdef __clang__
  m.attr("compiler") = __VERSION__;  // begins with "Clang"
#else
  m.attr("compiler") = "GCC " __VERSION__;
#endif
  convbn::bind_linear_maps(m);
}
