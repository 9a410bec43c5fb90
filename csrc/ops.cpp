// Every operator of the package on one screen, and the Python module that carries them.
// The backends (cpu/, cuda/) register their own implementations.
#include <torch/extension.h>

TORCH_LIBRARY(convbn_ext, m)
{
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.doc() = "Compiled part of convbn_ext"; }
