// Launchers of the Krylov verbs.
#include "krylov.cuh"

namespace convbn {

namespace {

dim3 chunk_grid(const KrylovProblem& p) { return dim3(p.systems * p.chunks()); }

template <class Pass, typename scalar_t>
void project(const KrylovProblem& p, const KrylovBasis& V, int k, const scalar_t* w, const KrylovScratch& scratch,
             double* H, double* norms, CUstream_st* stream) {
  const int pass = std::is_same_v<Pass, FirstPass> ? 1 : std::is_same_v<Pass, SecondPass> ? 2 : 3;
  const int first = pass == 3 ? k : 0, groups = (k - first) / kKrylovWarps + 1;
  CONVBN_LAUNCH((krylov_project_kernel<Pass, scalar_t>), chunk_grid(p), dim3(kKrylovThreads),
                (kKrylovWarps + k) * sizeof(double), stream, p, V, k, w, scratch);
  CONVBN_LAUNCH(krylov_merge_kernel, dim3(p.systems * groups), dim3(kKrylovThreads), 0, stream, p, pass, k, first,
                scratch, H, norms);
}

}  // namespace

int64_t krylov_scratch_size(const KrylovProblem& p, int k) {
  return p.systems * (p.chunks() + 1 + (k + 1) + int64_t{k + 1} * p.chunks());
}

void launch_krylov_orthonormalize(const KrylovProblem& p, const KrylovBasis& V, int k, const void* w, double* memory,
                                  double* H, CUstream_st* stream) {
  const KrylovScratch scratch(memory, p, k);
  with_real(p.is_double, [&]<typename scalar_t>(scalar_t) {
    const auto* from = static_cast<const scalar_t*>(w);
    CONVBN_LAUNCH(krylov_amax_kernel<scalar_t>, chunk_grid(p), dim3(kKrylovThreads), 0, stream, p, from, scratch.amax);
    project<FirstPass>(p, V, k, from, scratch, H, nullptr, stream);
    if (k > 0) {
      project<SecondPass>(p, V, k, from, scratch, H, nullptr, stream);
      project<ThirdPass>(p, V, k, from, scratch, H, nullptr, stream);
    }
    CONVBN_LAUNCH(krylov_normalize_kernel<scalar_t>, chunk_grid(p), dim3(kKrylovThreads), 0, stream, p, V, k, scratch);
  });
}

void launch_krylov_combine(const KrylovProblem& p, const KrylovBasis& V, int K, const double* y, void* out,
                           CUstream_st* stream) {
  with_real(p.is_double, [&]<typename scalar_t>(scalar_t) {
    CONVBN_LAUNCH(krylov_combine_kernel<scalar_t>, chunk_grid(p), dim3(kKrylovThreads), 0, stream, p, V, K, y,
                  static_cast<scalar_t*>(out));
  });
}

void launch_krylov_norms(const KrylovProblem& p, const void* x, double* memory, double* norms, CUstream_st* stream) {
  const KrylovScratch scratch(memory, p, 0);
  with_real(p.is_double, [&]<typename scalar_t>(scalar_t) {
    const auto* from = static_cast<const scalar_t*>(x);
    CONVBN_LAUNCH(krylov_amax_kernel<scalar_t>, chunk_grid(p), dim3(kKrylovThreads), 0, stream, p, from, scratch.amax);
    project<FirstPass>(p, {}, 0, from, scratch, nullptr, norms, stream);
  });
}

void launch_krylov_rotate(int64_t systems, int k, double eps, const double* H, const double* limits, int restart,
                          double* small, CUstream_st* stream) {
  CONVBN_LAUNCH(krylov_rotate_kernel, dim3(systems), dim3(kKrylovThreads), 3 * k * sizeof(double), stream, k, eps, H,
                limits, restart, small);
}

void launch_krylov_solve(int64_t systems, const double* small, int restart, int K, double* y, CUstream_st* stream) {
  CONVBN_LAUNCH(krylov_solve_kernel, dim3(systems), dim3(kKrylovThreads), K * sizeof(double), stream, small, restart, K,
                y);
}

}  // namespace convbn
