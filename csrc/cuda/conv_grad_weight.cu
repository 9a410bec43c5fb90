// Launchers of the convolution's gradient by its weight.
#include "conv_launch.cuh"

namespace convbn {

namespace {

constexpr int64_t kWantedBlocks = 512;  // fills the largest cards about twice; fixed, so that sums are
constexpr int64_t kSplitUnit = 512;     // pixels; fewer are not worth a partial result

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
  s.dy = gather_itself(s.input.pixels, p.out_channels, s.rows);
  s.tiles_m = tiles_of(s.rows, kTileM);
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

template <typename scalar_t>
void launch_gemm(const ConvProblem& p, const NormGradient<scalar_t>& dy, const Values<scalar_t>& x, int chunk,
                 const Splits& splits, float* partial, CUstream_st* stream) {
  GradWeightShape s = gemm_shape(p);
  s.input.advancing_by(kDepth<scalar_t>);
  s.dy.advancing_by(kDepth<scalar_t>);
  s.split_pixels = splits.pixels;
  const dim3 grid(s.tiles_m * s.tiles_n, s.groups * splits.count);
  with_product<scalar_t, false>(p, [&]<class P>(std::type_identity<P>) {
    with_pack<scalar_t>(chunk, [&](auto V) {
      CONVBN_LAUNCH((conv_grad_weight_kernel<P, NormGradient<scalar_t>, V>), grid, kThreads, kGemmShared, stream, s, dy,
                    x, partial);
    });
  });
}

template <typename scalar_t>
void launch_depthwise(const ConvProblem& p, const NormGradient<scalar_t>& dy, const Values<scalar_t>& x, int chunk,
                      const Splits& splits, float* partial, CUstream_st* stream) {
  with_pack<scalar_t>(chunk, [&](auto V) {
    Gather g = gather_input(p);
    g.advancing_by(kThreads / (kTileN / V));
    const dim3 grid(tiles_of(p.channels, kTileN), p.kernel[0] * p.kernel[1], splits.count);
    CONVBN_LAUNCH((depthwise_grad_weight_kernel<NormGradient<scalar_t>, V>), grid, kThreads, 0, stream, g, dy, x,
                  splits.pixels, partial);
  });
}

}  // namespace

int64_t conv_grad_weight_size(const ConvProblem& p) { return splits_of(p).count * weight_size(p); }

void launch_conv_grad_weight(const ConvProblem& p, const BnProblem& bn, const float* table, const void* x,
                             float* scratch, void* dw, CUstream_st* stream) {
  with_float_scalar(p.scalar, [&]<typename scalar_t>(scalar_t) {
    const Values<scalar_t> input{static_cast<const scalar_t*>(x)};
    const auto dy = norm_gradient<scalar_t>(bn, table);
    const Splits splits = splits_of(p);
    const int chunk = chunk_size<scalar_t>(p, {x, bn.y, bn.grad, bn.out, table, scratch});
    const auto launch = p.depthwise() ? launch_depthwise<scalar_t> : launch_gemm<scalar_t>;
    launch(p, dy, input, chunk, splits, scratch, stream);
    CONVBN_LAUNCH(conv_sum_splits_kernel<scalar_t>, tiles_of(weight_size(p), kThreads), kThreads, 0, stream, scratch,
                  weight_size(p), splits.count, static_cast<scalar_t*>(dw));
  });
}

}  // namespace convbn
