// Launchers of the reductions: one kernel over the tensors, one over the partial results.
#include "bn_launch.cuh"
#include "bn_reduce.cuh"

namespace convbn {

namespace {

__global__ void bn_finish_statistics_kernel(const double* __restrict__ partial, int channels, int stacked, int parts,
                                            double* __restrict__ mean, double* __restrict__ var) {
  const auto moments = unite_partials<Moments>(partial, channels, stacked, parts);
  if (threadIdx.x) return;
  mean[blockIdx.x] = moments.mean;
  var[blockIdx.x] = moments.m2 / moments.count;
}

}  // namespace

int64_t bn_scratch_size(const BnProblem& p) {
  int64_t size = 0;
  reduction(p, [&](auto, auto, auto, const Matrix&, const ReduceGrid& grid, dim3, dim3, int) {
    size = int64_t{Moments::kFields} * grid.columns * grid.parts;
  });
  return size;
}

void launch_bn_statistics(const BnProblem& p, double* scratch, double* mean, double* var, CUstream_st* stream) {
  reduction(p, [&]<typename scalar_t>(auto channels_last, scalar_t, auto V, const Matrix& m, const ReduceGrid& g,
                                      dim3 grid, dim3 block, int per_thread) {
    CONVBN_LAUNCH((bn_statistics_kernel<channels_last, scalar_t, V>), grid, block,
                  kThreads / 2 * per_thread * sizeof(MomentSums), stream, p, m, scratch);
    CONVBN_LAUNCH(bn_finish_statistics_kernel, m.channels, kFinishThreads, 0, stream, scratch, m.channels, m.stacked,
                  g.parts, mean, var);
  });
}

void launch_bn_backward_reduce(const BnProblem& p, double* scratch, double* sum_g, double* sum_gd,
                               CUstream_st* stream) {
  reduction(p, [&]<typename scalar_t>(auto channels_last, scalar_t, auto V, const Matrix& m, const ReduceGrid& g,
                                      dim3 grid, dim3 block, int per_thread) {
    with_activation(p.activation, [&]<class Act>(Act) {
      CONVBN_LAUNCH((bn_backward_reduce_kernel<channels_last, Act, scalar_t, V>), grid, block,
                    kThreads / 2 * per_thread * sizeof(Sums), stream, p, m, scratch);
    });
    CONVBN_LAUNCH(bn_finish_backward_kernel<acc_t<scalar_t>>, m.channels, kFinishThreads, 0, stream, scratch, p.mean,
                  m.channels, m.stacked, g.parts, sum_g, sum_gd);
  });
}

}  // namespace convbn
