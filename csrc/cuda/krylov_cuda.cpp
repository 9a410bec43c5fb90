// The torch side of the Krylov verbs on CUDA: tensors to pointers, device and stream, launch checks. What krylov.h
// wants on the host is copied there, one synchronisation per verb.
#include <ATen/cuda/CUDAContext.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/real.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "../krylov.h"
#include "krylov_kernels.h"

namespace convbn {

namespace {

using at::Tensor;

constexpr int64_t kMaxBasis = 5000;  // coefficients that a block of threads keeps in 48 KiB of shared memory

struct Launch {
  c10::cuda::CUDAGuard guard;
  CUstream_st* stream;
  Tensor rows;
  KrylovProblem problem;

  Launch(const Tensor& vectors, const Tensor& host_rows)
      : guard(vectors.device()), stream(at::cuda::getCurrentCUDAStream()), rows(host_rows.to(vectors.device())) {
    TORCH_CHECK_TYPE(vectors.scalar_type() == at::kFloat || vectors.scalar_type() == at::kDouble,
                     "gmres: on CUDA vectors must be float32 or float64, got ", vectors.scalar_type());
    problem.is_double = vectors.scalar_type() == at::kDouble;
    problem.systems = static_cast<int>(rows.numel());
    problem.n = vectors.size(-1);
    problem.rows = rows.const_data_ptr<int64_t>();
  }
};

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
  const Tensor vectors = w.contiguous(), H = at::empty({rows.numel(), k + 2}, w.options().dtype(at::kDouble));
  if (rows.numel() > 0) {
    launch_krylov_orthonormalize(launch.problem, basis_of(V, k + 1), static_cast<int>(k), vectors.const_data_ptr(),
                                 H.mutable_data_ptr<double>(), launch.stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return H.cpu().to(at::kComplexDouble);
}

Tensor combine_cuda(at::TensorList V, const Tensor& rows, const Tensor& y) {
  const Launch launch(V.front(), rows);
  const Tensor out = at::empty({rows.numel(), V.front().size(2)}, V.front().options());
  const Tensor coefficients = at::real(y).to(out.device()).contiguous();
  if (out.numel() > 0) {
    launch_krylov_combine(launch.problem, basis_of(V, y.size(1)), static_cast<int>(y.size(1)),
                          coefficients.const_data_ptr<double>(), out.mutable_data_ptr(), launch.stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return out;
}

Tensor norms_cuda(const Tensor& x) {
  const Launch launch(x, at::empty({x.size(0)}, at::kLong));
  const Tensor vectors = x.contiguous(), norms = at::empty({x.size(0)}, x.options().dtype(at::kDouble));
  if (x.size(0) > 0) {
    launch_krylov_norms(launch.problem, vectors.const_data_ptr(), norms.mutable_data_ptr<double>(), launch.stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return norms.cpu();
}

}  // namespace

TORCH_LIBRARY_IMPL(convbn_ext, CUDA, m) {
  m.impl("krylov_orthonormalize", &orthonormalize_cuda);
  m.impl("krylov_combine", &combine_cuda);
  m.impl("krylov_norms", &norms_cuda);
}

}  // namespace convbn
