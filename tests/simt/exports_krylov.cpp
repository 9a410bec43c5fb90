// The launchers of csrc/cuda/krylov_kernels.h for Python, for a basis in two blocks.
#include <vector>

#include "api.h"
#include "krylov_kernels.h"

namespace {

convbn::KrylovProblem problem(int64_t is_double, int64_t systems, int64_t n, const int64_t* rows) {
  return {is_double != 0, systems, n, rows};
}

// The second block begins with vector `split`.
convbn::KrylovBasis basis(void* first, void* second, int64_t split, int64_t slots, int64_t n) {
  convbn::KrylovBasis V;
  V.block[0] = {first, 0, slots * n};
  V.block[1] = {second, split, slots * n};
  V.blocks = second ? 2 : 1;
  return V;
}

}  // namespace

#define KRYLOV_PARAMETERS                                                                                       \
  int64_t is_double, int64_t systems, int64_t n, const int64_t *rows, void *first, void *second, int64_t split, \
      int64_t slots
#define KRYLOV_ARGUMENTS problem(is_double, systems, n, rows), basis(first, second, split, slots, n)

SIMT_API int64_t krylov_scratch(int64_t systems, int64_t n, int64_t k) {
  return convbn::krylov_scratch_size(problem(0, systems, n, nullptr), static_cast<int>(k));
}
SIMT_API void krylov_orthonormalize(KRYLOV_PARAMETERS, int64_t k, const void* w, double* scratch, double* H) {
  convbn::launch_krylov_orthonormalize(KRYLOV_ARGUMENTS, static_cast<int>(k), w, scratch, H, nullptr);
}
SIMT_API void krylov_combine(KRYLOV_PARAMETERS, int64_t K, const double* y, void* out) {
  convbn::launch_krylov_combine(KRYLOV_ARGUMENTS, static_cast<int>(K), y, out, nullptr);
}
SIMT_API void krylov_norms(int64_t is_double, int64_t systems, int64_t n, const void* x, double* scratch,
                           double* norms) {
  convbn::launch_krylov_norms(problem(is_double, systems, n, nullptr), x, scratch, norms, nullptr);
}
SIMT_API void krylov_rotate(int64_t systems, int64_t k, double eps, const double* H, const double* limits,
                            int64_t restart, double* small) {
  convbn::launch_krylov_rotate(systems, static_cast<int>(k), eps, H, limits, static_cast<int>(restart), small, nullptr);
}
SIMT_API void krylov_solve(int64_t systems, const double* small, int64_t restart, int64_t K, double* y) {
  convbn::launch_krylov_solve(systems, small, static_cast<int>(restart), static_cast<int>(K), y, nullptr);
}

// sizes: channels in, out, groups; then in, out, kernel, stride, dilation and padding in front of each axis; padding
// mode.
SIMT_API void gmres_cycle(int64_t is_double, int64_t systems, int64_t n, int64_t restart, double eps, const void* r,
                          const double* limits, int64_t near, void* far, double* small, void* u, const int64_t* sizes,
                          const void* weight, const void* row_scale) {
  convbn::ConvStencil A{static_cast<int>(sizes[0]), static_cast<int>(sizes[1]), static_cast<int>(sizes[2])};
  const int64_t* next = sizes + 3;
  for (int* axes : {A.in, A.out, A.kernel, A.stride, A.dilation, A.before})
    for (int axis = 0; axis < 3; ++axis) axes[axis] = static_cast<int>(*next++);
  A.mode = static_cast<convbn::PaddingMode>(*next);
  A.weight = weight;
  A.row_scale = row_scale;
  convbn::launch_gmres_cycle({is_double != 0, systems, static_cast<int>(n), static_cast<int>(restart), eps, r, limits,
                              static_cast<int>(near), far, small, u},
                             A, nullptr);
}
SIMT_API int64_t gmres_cycle_near(int64_t is_double, int64_t n, int64_t restart, int64_t shared_bytes) {
  return convbn::gmres_cycle_near(is_double != 0, n, restart, shared_bytes);
}
SIMT_API int64_t small_problem_size(int64_t restart) { return convbn::SmallProblem::size(restart); }
