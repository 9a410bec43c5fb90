// The torch side of a restart cycle in one launch: tensors to pointers, device and stream, launch check. No copy to or
// from the host, so it may be captured in a CUDA graph.
#include <ATen/cuda/CUDAContext.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>

#include "../convolution.h"
#include "krylov_kernels.h"

namespace convbn {

namespace {

using at::Tensor;

// The geometry with leading axes of size one where it has fewer than three.
ConvStencil stencil_of(const Tensor& weight, at::IntArrayRef spatial, const ConvGeometry& g) {
  const int64_t axes = g.axes(), C_in = weight.size(1) * g.groups;
  TORCH_CHECK_VALUE(axes <= 3, "gmres_cycle: at most three spatial axes, got ", axes);
  std::vector<int64_t> input = {1, C_in};
  input.insert(input.end(), spatial.begin(), spatial.end());
  const auto output = g.output_sizes(input, weight.sizes());
  ConvStencil A{static_cast<int>(C_in), static_cast<int>(weight.size(0)), static_cast<int>(g.groups)};
  for (int i = 0; i < 3; ++i) {
    const int64_t axis = i - (3 - axes);
    const auto pick = [axis](const auto& values, int64_t at, int64_t otherwise) {
      return static_cast<int>(axis < 0 ? otherwise : values[at]);
    };
    A.in[i] = pick(spatial, axis, 1);
    A.out[i] = pick(output, axis + 2, 1);
    A.kernel[i] = pick(weight.sizes(), axis + 2, 1);
    A.stride[i] = pick(g.stride, axis, 1);
    A.dilation[i] = pick(g.dilation, axis, 1);
    A.before[i] = pick(g.padding, 2 * axis, 0);
  }
  A.mode = g.mode;
  return A;
}

// Shared memory for the basis: all that a block may have while every multiprocessor has at most one system, else a
// share of it.
int64_t shared_budget(int64_t systems) {
  const auto* device = at::cuda::getCurrentDeviceProperties();
  const int64_t resident = (systems + device->multiProcessorCount - 1) / device->multiProcessorCount;
  const int64_t fair = int64_t(device->sharedMemPerMultiprocessor) / std::min<int64_t>(resident, 2) - 1024;
  return std::min<int64_t>(fair, device->sharedMemPerBlockOptin);
}

std::tuple<Tensor, Tensor> gmres_cycle_cuda(const Tensor& r, const Tensor& limits, int64_t restart, double eps,
                                            const Tensor& weight, const std::optional<Tensor>& row_scale,
                                            at::IntArrayRef spatial, at::IntArrayRef stride, at::IntArrayRef padding,
                                            at::IntArrayRef dilation, int64_t groups, c10::string_view padding_mode) {
  const c10::cuda::CUDAGuard guard(r.device());
  TORCH_CHECK_TYPE(r.scalar_type() == at::kFloat || r.scalar_type() == at::kDouble,
                   "gmres: on CUDA vectors must be float32 or float64, got ", r.scalar_type());
  const int64_t S = r.size(0), n = r.size(1);
  const ConvGeometry geometry{stride.vec(), padding.vec(), dilation.vec(), groups, parse_padding_mode(padding_mode)};
  const Tensor residuals = r.contiguous(), taps = weight.contiguous();
  const Tensor scaling = row_scale ? row_scale->contiguous() : Tensor();
  ConvStencil A = stencil_of(taps, spatial, geometry);
  const int64_t m = int64_t{A.channels_out} * A.out[0] * A.out[1] * A.out[2];
  TORCH_CHECK_VALUE(m == n && n < std::numeric_limits<int>::max() / 2, "gmres_cycle: the layer must be square, got ", n,
                    " -> ", m);
  A.weight = taps.const_data_ptr();
  A.row_scale = scaling.defined() ? scaling.const_data_ptr() : nullptr;

  GmresCycle cycle{r.scalar_type() == at::kDouble, S, static_cast<int>(n), static_cast<int>(restart), eps};
  cycle.near = gmres_cycle_near(cycle.is_double, n, restart, shared_budget(S));
  TORCH_CHECK_VALUE(cycle.near >= 0, "gmres_cycle: restart ", restart, " needs more shared memory than a block has");
  const Tensor far = at::empty({S, restart + 1 - cycle.near, n}, r.options()), u = at::empty({S, n}, r.options());
  const Tensor small = at::empty({S, SmallProblem::size(restart)}, r.options().dtype(at::kDouble));
  if (S == 0) return {u, small};
  cycle.r = residuals.const_data_ptr();
  cycle.limits = limits.const_data_ptr<double>();
  cycle.far = far.mutable_data_ptr();
  cycle.small = small.mutable_data_ptr<double>();
  cycle.u = u.mutable_data_ptr();
  launch_gmres_cycle(cycle, A, at::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {u, small};
}

}  // namespace

TORCH_LIBRARY_IMPL(convbn_ext, CUDA, m) { m.impl("gmres_cycle", &gmres_cycle_cuda); }

}  // namespace convbn
