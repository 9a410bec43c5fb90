// Launchers of the convolution's gradient by its weight.
#include "conv_grad_weight.cuh"
#include "conv_launch.cuh"

namespace convbn {

namespace {

constexpr int64_t kWantedBlocks = 512;  // fills the largest cards about twice; fixed, so that sums are
constexpr int64_t kSplitUnit = 512;     // pixels; fewer are not worth a partial result

// Σg and Σg·(y − μ) as bn_finish_backward gives them, and mean(g − g'). A block per channel.
__global__ void conv_finish_sums_kernel(GradWeightPartial partial, const double* __restrict__ mean,
                                        const float* __restrict__ guess, int64_t pixels, double* __restrict__ sum_g,
                                        double* __restrict__ sum_gd, double* __restrict__ taken) {
  const int channel = blockIdx.x;
  const auto sums = unite_partials<GradientSums>(partial.sums, partial.channels, 1, partial.splits);
  if (threadIdx.x) return;
  sum_g[channel] = sums.g;
  sum_gd[channel] = sums.gd + (static_cast<float>(mean[channel]) - mean[channel]) * sums.g;
  taken[channel] = (guess ? guess[channel] : 0.) + sums.lost / pixels;
}

struct Splits {
  int count;
  int64_t pixels;  // of each but the last

  Splits(int64_t all_pixels, int64_t blocks) {
    const int64_t units = std::max<int64_t>(1, ceil_div(all_pixels, kSplitUnit));
    pixels = ceil_div(units, std::clamp<int64_t>(ceil_div(kWantedBlocks, blocks), 1, units)) * kSplitUnit;
    count = std::max(1, static_cast<int>(ceil_div(all_pixels, pixels)));
  }
};

GradWeightShape gemm_shape(const ConvProblem& p) {
  GradWeightShape s;
  s.input = gather_input(p);
  s.rows = p.out_channels / p.groups;
  s.columns = s.input.columns();
  s.tiles_m = tiles_of(s.rows, kTileK);
  s.tiles_n = tiles_of(s.columns, kTileN);
  s.groups = p.groups;
  return s;
}

Splits splits_of(const ConvProblem& p) {
  const GradWeightShape s = gemm_shape(p);
  const int64_t blocks = p.depthwise() ? int64_t{tiles_of(p.channels, kTileN)} * p.kernel[0] * p.kernel[1]
                                       : int64_t{s.tiles_m} * s.tiles_n * s.groups;
  return Splits(s.input.pixels, blocks);
}

int64_t weight_size(const ConvProblem& p) {
  return int64_t{p.out_channels} * (p.channels / p.groups) * p.kernel[0] * p.kernel[1];
}

// Where partial results lie in `memory`, products at a multiple of 16 bytes.
struct GradWeightScratch : GradWeightPartial {
  double* taken;
  int64_t size;  // doubles

  GradWeightScratch(const ConvProblem& p, double* memory) {
    channels = p.out_channels;
    splits = splits_of(p).count;
    const int64_t floats = splits * (2 * weight_size(p) + weight_size(p) / (p.out_channels / p.groups));
    const int64_t doubles = ceil_div(channels * (int64_t{GradientSums::kFields} * splits + 1), 2) * 2;
    size = doubles + ceil_div(floats, 2);
    sums = memory;
    taken = sums + int64_t{GradientSums::kFields} * channels * splits;
    products = reinterpret_cast<float*>(memory + doubles);
    columns = products + 2 * splits * weight_size(p);
  }
};

template <typename scalar_t>
void launch_gemm(const ConvProblem& p, const MaskedGradient<scalar_t>& gradient, const Values<scalar_t>& x, int chunk,
                 const GradWeightPartial& partial, CUstream_st* stream) {
  GradWeightShape s = gemm_shape(p);
  s.input.advancing_by(kDepth<scalar_t>);
  s.split_pixels = splits_of(p).pixels;
  const dim3 grid(s.tiles_m * s.tiles_n, s.groups * partial.splits);
  with_product<scalar_t, false>(p, [&]<class P>(std::type_identity<P>) {
    with_pack<scalar_t>(chunk, [&](auto V) {
      CONVBN_LAUNCH((conv_grad_weight_kernel<P, MaskedGradient<scalar_t>, V>), grid, kThreads, kGemmShared, stream, s,
                    gradient, x, partial);
    });
  });
}

template <typename scalar_t>
void launch_depthwise(const ConvProblem& p, const MaskedGradient<scalar_t>& gradient, const Values<scalar_t>& x,
                      int chunk, const GradWeightPartial& partial, CUstream_st* stream) {
  with_pack<scalar_t>(chunk, [&](auto V) {
    Gather g = gather_input(p);
    g.advancing_by(kThreads / (kTileN / V));
    const dim3 grid(tiles_of(p.channels, kTileN), p.kernel[0] * p.kernel[1], partial.splits);
    CONVBN_LAUNCH((depthwise_grad_weight_kernel<MaskedGradient<scalar_t>, V>), grid, kThreads, 0, stream, g, gradient,
                  x, splits_of(p).pixels, partial);
  });
}

}  // namespace

int64_t conv_grad_weight_size(const ConvProblem& p) { return GradWeightScratch(p, nullptr).size; }

void launch_conv_grad_weight(const ConvProblem& p, const BnProblem& bn, const float* table, const void* x,
                             double* memory, double* sum_g, double* sum_gd, CUstream_st* stream) {
  const GradWeightScratch scratch(p, memory);
  with_float_scalar(p.scalar, [&]<typename scalar_t>(scalar_t) {
    const Values<scalar_t> input{static_cast<const scalar_t*>(x)};
    const auto gradient = masked_gradient<scalar_t>(bn, table);
    const int chunk = chunk_size<scalar_t>(p, {x, bn.y, bn.grad, bn.out, table, memory});
    const auto launch = p.depthwise() ? launch_depthwise<scalar_t> : launch_gemm<scalar_t>;
    launch(p, gradient, input, chunk, scratch, stream);
  });
  CONVBN_LAUNCH(conv_finish_sums_kernel, p.out_channels, kFinishThreads, 0, stream, scratch, bn.mean,
                p.scalar == Scalar::f32 ? table + 3 * bn.channels : nullptr, gather_input(p).pixels, sum_g, sum_gd,
                scratch.taken);
}

void launch_conv_combine_weight(const ConvProblem& p, const BnProblem& bn, const double* a, const double* b,
                                const double* c, double* memory, void* dw, CUstream_st* stream) {
  const GradWeightScratch scratch(p, memory);
  const int taps = p.kernel[0] * p.kernel[1];
  const int rows = p.depthwise() ? taps : p.out_channels / p.groups;
  const int columns = p.depthwise() ? p.channels : gather_input(p).columns(), groups = p.depthwise() ? 1 : p.groups;
  with_float_scalar(p.scalar, [&]<typename scalar_t>(scalar_t) {
    with_layout(p.depthwise(), [&](auto depthwise) {
      CONVBN_LAUNCH((conv_combine_weight_kernel<depthwise, scalar_t>), tiles_of(weight_size(p), kThreads), kThreads, 0,
                    stream, scratch, rows, columns, groups, bn.mean, scratch.taken, a, b, c,
                    static_cast<scalar_t*>(dw));
    });
  });
}

}  // namespace convbn
