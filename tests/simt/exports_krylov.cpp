// The launchers of csrc/cuda/krylov_kernels.h for Python, for a basis in two blocks.
#include "api.h"
#include "krylov_kernels.h"

namespace {

convbn::KrylovProblem problem(int64_t is_double, int64_t systems, int64_t n, const int64_t* rows) {
  return {is_double != 0, static_cast<int>(systems), n, rows};
}

// The second block begins with vector `split`.
convbn::KrylovBasis basis(void* first, void* second, int64_t split, int64_t slots, int64_t n) {
  convbn::KrylovBasis V;
  V.block[0] = {first, 0, slots * n};
  V.block[1] = {second, split, slots * n};
  V.blocks = 2;
  return V;
}

}  // namespace

#define KRYLOV_PARAMETERS                                                                                       \
  int64_t is_double, int64_t systems, int64_t n, const int64_t *rows, void *first, void *second, int64_t split, \
      int64_t slots
#define KRYLOV_ARGUMENTS problem(is_double, systems, n, rows), basis(first, second, split, slots, n)

SIMT_API void krylov_orthonormalize(KRYLOV_PARAMETERS, int64_t k, const void* w, double* H) {
  convbn::launch_krylov_orthonormalize(KRYLOV_ARGUMENTS, static_cast<int>(k), w, H, nullptr);
}
SIMT_API void krylov_combine(KRYLOV_PARAMETERS, int64_t K, const double* y, void* out) {
  convbn::launch_krylov_combine(KRYLOV_ARGUMENTS, static_cast<int>(K), y, out, nullptr);
}
SIMT_API void krylov_norms(int64_t is_double, int64_t systems, int64_t n, const void* x, double* norms) {
  convbn::launch_krylov_norms(problem(is_double, systems, n, nullptr), x, norms, nullptr);
}
