// Launchers of the Krylov verbs.
#include "krylov.cuh"

namespace convbn {

namespace {

template <class F>
void with_real(bool is_double, F f) {
  is_double ? f(double{}) : f(float{});
}

}  // namespace

void launch_krylov_orthonormalize(const KrylovProblem& p, const KrylovBasis& V, int k, const void* w, double* H,
                                  CUstream_st* stream) {
  with_real(p.is_double, [&]<typename scalar_t>(scalar_t) {
    CONVBN_LAUNCH(krylov_orthonormalize_kernel<scalar_t>, dim3(p.systems), dim3(kKrylovThreads),
                  (kKrylovWarps + k) * sizeof(double), stream, p, V, k, static_cast<const scalar_t*>(w), H);
  });
}

void launch_krylov_combine(const KrylovProblem& p, const KrylovBasis& V, int K, const double* y, void* out,
                           CUstream_st* stream) {
  const dim3 grid(p.systems, (p.n + kKrylovThreads - 1) / kKrylovThreads);
  with_real(p.is_double, [&]<typename scalar_t>(scalar_t) {
    CONVBN_LAUNCH(krylov_combine_kernel<scalar_t>, grid, dim3(kKrylovThreads), 0, stream, p, V, K, y,
                  static_cast<scalar_t*>(out));
  });
}

void launch_krylov_norms(const KrylovProblem& p, const void* x, double* norms, CUstream_st* stream) {
  with_real(p.is_double, [&]<typename scalar_t>(scalar_t) {
    CONVBN_LAUNCH(krylov_norms_kernel<scalar_t>, dim3(p.systems), dim3(kKrylovThreads), 0, stream, p,
                  static_cast<const scalar_t*>(x), norms);
  });
}

}  // namespace convbn
