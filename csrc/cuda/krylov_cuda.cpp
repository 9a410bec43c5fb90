// The torch side of the Krylov verbs on CUDA: tensors to pointers, device and stream, launch checks. Nothing is copied
// to or from the host (index tensors that come from there excepted), so the verbs may be captured in a CUDA graph.
#include <ATen/cuda/CUDAContext.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "../krylov.h"
#include "krylov_kernels.h"

namespace convbn {

namespace {

using at::Tensor;

constexpr int64_t kMaxBasis = 5000;    // coefficients that a block of threads keeps in 48 KiB of shared memory
constexpr int64_t kMaxRotated = 2000;  // columns, three numbers each

struct Launch {
  c10::cuda::CUDAGuard guard;
  CUstream_st* stream;
  Tensor rows;
  KrylovProblem problem;

  explicit Launch(const Tensor& vectors, const Tensor& slots = {})
      : guard(vectors.device()), stream(at::cuda::getCurrentCUDAStream()) {
    TORCH_CHECK_TYPE(vectors.scalar_type() == at::kFloat || vectors.scalar_type() == at::kDouble,
                     "gmres: on CUDA vectors must be float32 or float64, got ", vectors.scalar_type());
    if (slots.defined()) rows = slots.to(vectors.device());
    problem.is_double = vectors.scalar_type() == at::kDouble;
    problem.systems = slots.defined() ? slots.numel() : vectors.size(0);
    problem.n = vectors.size(-1);
    problem.rows = slots.defined() ? rows.const_data_ptr<int64_t>() : nullptr;
    TORCH_CHECK_VALUE(problem.systems * problem.chunks() <= std::numeric_limits<int>::max(),
                      "gmres: too many systems for one launch on CUDA, ", problem.systems, " of ", problem.n);
  }
  Tensor doubles(at::IntArrayRef sizes) const {
    return at::empty(sizes, at::TensorOptions(at::kDouble).device(guard.current_device()));
  }
  Tensor complexes(at::IntArrayRef sizes) const {
    return at::empty(sizes, at::TensorOptions(at::kComplexDouble).device(guard.current_device()));
  }
};

double* reals(const Tensor& complex) {
  return reinterpret_cast<double*>(complex.mutable_data_ptr<c10::complex<double>>());
}
const double* const_reals(const Tensor& complex) {
  return reinterpret_cast<const double*>(complex.const_data_ptr<c10::complex<double>>());
}

KrylovBasis basis_of(at::TensorList V, int64_t count) {
  KrylovBasis basis;
  int64_t first = 0;
  for (const Tensor& block : V) {
    TORCH_CHECK(basis.blocks < kMaxBasisBlocks && block.stride(1) == block.size(2) && block.stride(2) == 1,
                "krylov: at most ", kMaxBasisBlocks, " blocks of dense vectors");
    basis.block[basis.blocks++] = {block.data_ptr(), first, block.stride(0)};
    first += block.size(0);
  }
  TORCH_CHECK(count <= first && count <= kMaxBasis, "krylov: the basis holds ", first, " vectors, at most ", kMaxBasis,
              " on CUDA, and ", count, " are asked for");
  return basis;
}

Tensor orthonormalize_cuda(at::TensorList V, const Tensor& rows, int64_t k, const Tensor& w) {
  const Launch launch(w, rows);
  const Tensor vectors = w.contiguous(), H = launch.complexes({rows.numel(), k + 2});
  if (rows.numel() == 0) return H;
  const Tensor scratch = launch.doubles({krylov_scratch_size(launch.problem, static_cast<int>(k))});
  launch_krylov_orthonormalize(launch.problem, basis_of(V, k + 1), static_cast<int>(k), vectors.const_data_ptr(),
                               scratch.mutable_data_ptr<double>(), reals(H), launch.stream);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return H;
}

Tensor combine_cuda(at::TensorList V, const Tensor& rows, const Tensor& y) {
  const Launch launch(V.front(), rows);
  const Tensor out = at::empty({rows.numel(), V.front().size(2)}, V.front().options());
  const Tensor coefficients = y.to(out.device()).contiguous();
  if (out.numel() == 0) return out;
  launch_krylov_combine(launch.problem, basis_of(V, y.size(1)), static_cast<int>(y.size(1)), const_reals(coefficients),
                        out.mutable_data_ptr(), launch.stream);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

Tensor norms_cuda(const Tensor& x) {
  const Launch launch(x);
  const Tensor vectors = x.contiguous(), norms = launch.doubles({x.size(0)});
  if (x.size(0) == 0) return norms;
  const Tensor scratch = launch.doubles({krylov_scratch_size(launch.problem, 0)});
  launch_krylov_norms(launch.problem, vectors.const_data_ptr(), scratch.mutable_data_ptr<double>(),
                      norms.mutable_data_ptr<double>(), launch.stream);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return norms;
}

void rotate_cuda(const Tensor& small, const Tensor& H, const Tensor& limits, int64_t restart, double eps) {
  const Launch launch(small);
  const int64_t k = H.size(1) - 2;
  TORCH_CHECK_VALUE(k <= kMaxRotated, "gmres: at most ", kMaxRotated, " steps per cycle on CUDA, got ", k);
  if (small.size(0) == 0) return;
  launch_krylov_rotate(small.size(0), static_cast<int>(k), eps, const_reals(H), limits.const_data_ptr<double>(),
                       static_cast<int>(restart), small.mutable_data_ptr<double>(), launch.stream);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor solve_cuda(const Tensor& small, int64_t restart, int64_t K) {
  const Launch launch(small);
  const Tensor y = launch.complexes({small.size(0), K});
  if (y.numel() == 0) return y;
  launch_krylov_solve(small.size(0), small.const_data_ptr<double>(), static_cast<int>(restart), static_cast<int>(K),
                      reals(y), launch.stream);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(convbn_ext, CUDA, m) {
  m.impl("krylov_orthonormalize", &orthonormalize_cuda);
  m.impl("krylov_combine", &combine_cuda);
  m.impl("krylov_norms", &norms_cuda);
  m.impl("krylov_rotate", &rotate_cuda);
  m.impl("krylov_solve", &solve_cuda);
}

}  // namespace convbn
