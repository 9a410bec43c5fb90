// Launcher of a restart cycle.
#include <algorithm>

#include "gmres_cycle.cuh"

namespace convbn {

int gmres_cycle_near(bool is_double, int64_t n, int64_t restart, int64_t shared_bytes) {
  const int64_t left = shared_bytes - cycle_doubles(restart) * int64_t{sizeof(double)};
  if (left < 0) return -1;
  return static_cast<int>(std::min(left / (n * (is_double ? 8 : 4)), restart + 1));
}

void launch_gmres_cycle(const GmresCycle& c, const ConvStencil& A, CUstream_st* stream) {
  const size_t basis = static_cast<size_t>(c.near) * c.n * (c.is_double ? 8 : 4);
  const size_t bytes = cycle_doubles(c.restart) * sizeof(double) + basis;
  with_real(c.is_double, [&]<typename scalar_t>(scalar_t) {
    CONVBN_ALLOW_SHARED(gmres_cycle_kernel<scalar_t>, bytes);
    CONVBN_LAUNCH(gmres_cycle_kernel<scalar_t>, dim3(c.systems), dim3(kKrylovThreads), bytes, stream, c, A);
  });
}

}  // namespace convbn
