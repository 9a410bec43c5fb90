// Both y and dx are, with the pixel m(p, t) that pixel p of the result meets with tap t, and w_t (from, to),
//   out[p, :] = Σ_t in[m(p, t), :] w_t
//   y:  m = p·s + t·d − pad       dx:  m = (p + pad − t·d) / s, where that is whole
// For dx the pixels p are taken by their remainder of s, the phase, in which all meet the same taps. The pixels of `in`
// are gathered tap by tap, zeros beside the image, for as many of `out` as leaves them in the L2 cache.
#include "gathered_convolution.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "axes.h"
#include "bn_blocks.h"
#include "isa.h"
#include "memory_format.h"

#define CONVBN_LOOPS "products.inl"
#include "each_isa.inl"

namespace convbn {

using at::IntArrayRef;
using at::Tensor;

namespace {

constexpr int64_t kLineBytes = 64;
constexpr int64_t kTileRows = 6;        // pixels that the products take at once
constexpr int64_t kMostPixels = 96;     // of a chunk
constexpr int64_t kGathered = 1 << 17;  // values of a chunk
constexpr int64_t kDepth = 64;          // of a product, about: longer sums in float32 round more
constexpr int64_t kUnits = 16;          // of work, if there are so many chunks or columns
constexpr int64_t kStripBytes = 256;    // columns of the products

using Index = std::array<int64_t, 3>;  // along the axes

struct Phase {
  Index first, count;  // pixels of the result: first, first + step, … , `count` of them
  std::vector<Index> taps;
  int64_t pixels() const { return count[0] * count[1] * count[2]; }  // of an image
};

struct Chunk {
  const Phase* phase;
  int64_t first, count;  // pixels of all images
};

struct Run {
  int64_t image;
  Index at;       // the first pixel of the result
  int64_t count;  // pixels of the phase along the last axis
};

class Gather {
 public:
  Gather(IntArrayRef x, IntArrayRef y, IntArrayRef weight, const ConvGeometry& g, bool adjoint)
      : axes_(axes_of(x, y, weight, g)), adjoint_(adjoint), images_(x[0]) {
    Index steps, first;
    for (int i = 0; i < 3; ++i) steps[i] = step(axes_[i]);
    for (first[0] = 0; first[0] < steps[0]; ++first[0])
      for (first[1] = 0; first[1] < steps[1]; ++first[1])
        for (first[2] = 0; first[2] < steps[2]; ++first[2]) phases_.push_back(phase(first));
  }

  std::vector<Chunk> chunks(int64_t channels) const {
    std::vector<Chunk> all;
    for (const Phase& p : phases_) {
      const int64_t values = std::max<int64_t>(1, p.taps.size()) * channels, pixels = images_ * p.pixels();
      const int64_t most = std::clamp(kGathered / values, kTileRows, kMostPixels) / kTileRows * kTileRows;
      for (int64_t first = 0; first < pixels; first += most) all.push_back({&p, first, std::min(most, pixels - first)});
    }
    return all;
  }

  // Rows or parts of rows of the result, one after the other.
  std::vector<Run> runs(const Chunk& chunk) const {
    const Phase& p = *chunk.phase;
    std::vector<Run> all;
    for (int64_t q = chunk.first, end = q + chunk.count; q < end;) {
      const int64_t w = q % p.count[2], row = q / p.count[2], h = row % p.count[1], d = row / p.count[1] % p.count[0];
      const int64_t count = std::min(p.count[2] - w, end - q);
      const Index at{p.first[0] + d * step(axes_[0]), p.first[1] + h * step(axes_[1]), p.first[2] + w * step(axes_[2])};
      all.push_back({row / p.count[1] / p.count[0], at, count});
      q += count;
    }
    return all;
  }

  // `from` of `channels` values of the pixels that a run meets with a tap, zeros where there are none
  template <class T>
  void copy(const Run& run, const Index& tap, const T* data, int64_t channels, int64_t from, T* to) const {
    const auto& [depth, height, width] = axes_;
    const int64_t d = source(depth, run.at[0], tap[0]), h = source(height, run.at[1], tap[1]);
    const int64_t depths = size(depth, !adjoint_), heights = size(height, !adjoint_), widths = size(width, !adjoint_);
    const int64_t first = source(width, run.at[2], tap[2]), step = adjoint_ ? 1 : width.stride;
    const bool inside = d >= 0 && d < depths && h >= 0 && h < heights;
    const int64_t low =
        inside ? std::clamp<int64_t>(pieces(std::max<int64_t>(-first, 0), step), 0, run.count) : run.count;
    const int64_t high = std::clamp<int64_t>(pieces(std::max<int64_t>(widths - first, 0), step), low, run.count);
    std::fill_n(to, low * from, T{0});
    std::fill(to + high * from, to + run.count * from, T{0});
    if (low == high) return;
    const T* pixel = data + (((run.image * depths + d) * heights + h) * widths + first + low * step) * channels;
    if (step == 1 && from == channels) {
      std::copy_n(pixel, (high - low) * from, to + low * from);
      return;
    }
    for (int64_t i = low; i < high; ++i, pixel += step * channels) std::copy_n(pixel, from, to + i * from);
  }

  // Where a run's pixels are in the result, and from one to the next.
  int64_t first_pixel(const Run& run) const {
    int64_t pixel = run.image;
    for (int i = 0; i < 3; ++i) pixel = pixel * size(axes_[i], adjoint_) + run.at[i];
    return pixel;
  }
  int64_t pixel_step() const { return step(axes_[2]); }
  int64_t tap(const Index& t) const { return (t[0] * axes_[1].kernel + t[1]) * axes_[2].kernel + t[2]; }

 private:
  Axes axes_;
  bool adjoint_;
  int64_t images_;
  std::vector<Phase> phases_;

  static int64_t size(const Axis& axis, bool of_x) { return of_x ? axis.x : axis.y; }
  int64_t step(const Axis& axis) const { return adjoint_ ? axis.stride : 1; }
  int64_t source(const Axis& axis, int64_t i, int64_t t) const {
    return adjoint_ ? (i + axis.padding - t * axis.dilation) / axis.stride : axis.met(i, t);
  }

  Phase phase(const Index& first) const {
    Phase result{.first = first};
    std::array<std::vector<int64_t>, 3> taps;  // along each axis
    for (int i = 0; i < 3; ++i) {
      const Axis& axis = axes_[i];
      result.count[i] = pieces(std::max<int64_t>(size(axis, adjoint_) - first[i], 0), step(axis));
      for (int64_t t = 0; t < axis.kernel; ++t)
        if (!adjoint_ || (first[i] + axis.padding - t * axis.dilation) % axis.stride == 0) taps[i].push_back(t);
    }
    for (const int64_t d : taps[0])
      for (const int64_t h : taps[1])
        for (const int64_t w : taps[2]) result.taps.push_back({d, h, w});
    return result;
  }
};

// w_t (groups, taps, from, columns), the columns padded with zeros to an odd number of cache lines, so that rows do not
// push each other out of the cache
Tensor packed(const Tensor& weight, int64_t groups, bool adjoint) {
  const int64_t out = weight.size(0) / groups, in = weight.size(1), taps = weight.numel() / weight.size(0) / in;
  const Tensor w = to_format(weight.reshape({groups, out, in, taps}).view({groups * out, in, taps, 1}),
                             at::MemoryFormat::ChannelsLast)
                       .permute({0, 2, 3, 1});  // (out channels, taps, 1, in channels) in memory
  const Tensor t = adjoint ? w.view({groups, out, taps, in}).transpose(1, 2)
                           : to_format(w.view({groups, out, 1, taps * in}), at::MemoryFormat::ChannelsLast)
                                 .permute({0, 2, 3, 1})
                                 .view({groups, taps, in, out});
  const int64_t lanes = kLineBytes / weight.element_size();
  return at::constant_pad_nd(t, {0, (pieces(t.size(3), lanes) | 1) * lanes - t.size(3)}).contiguous();
}

template <class T>
Tensor product_of(const Tensor& given, const Tensor& weight, IntArrayRef x_sizes, IntArrayRef y_sizes,
                  const ConvGeometry& g, bool adjoint) {
  static const auto multiply = best_of(&baseline::add_products<T>, &avx2::add_products<T>, &avx512::add_products<T>);
  const Tensor data = to_format(given, last_format(g.axes())), w = packed(weight, g.groups, adjoint);
  const Gather gather(x_sizes, y_sizes, weight.sizes(), g, adjoint);
  const int64_t taps = w.size(1), from = w.size(2), row = w.size(3), all = data.size(1);
  const auto chunks = gather.chunks(from);
  const int64_t to = weight.numel() / taps / from / g.groups, word = best_of(16, 32, 64) / sizeof(T);
  const int64_t columns = pieces(to, word) * word;
  // blocks of columns
  const int64_t count = chunks.size() * g.groups, strip = kStripBytes / sizeof(T);
  const int64_t width = pieces(pieces(columns, strip), pieces(kUnits, count)) * strip, blocks = pieces(columns, width);
  const Tensor out = at::empty(adjoint ? x_sizes : y_sizes, data.options().memory_format(last_format(g.axes())));
  const T *const in = data.const_data_ptr<T>(), *const matrices = w.const_data_ptr<T>();
  T* const result = out.mutable_data_ptr<T>();
  at::parallel_for(0, count * blocks, 1, [&](int64_t begin, int64_t end) {
    thread_local AlignedVector<T> gathered, products;
    std::vector<const T*> A, B;
    for (int64_t work = begin; work < end; ++work) {
      const Chunk& chunk = chunks[work / blocks / g.groups];
      const int64_t group = work / blocks % g.groups, first = work % blocks * width;
      const int64_t here = std::min(width, columns - first), wanted = std::min(width, to - first);
      const auto runs = gather.runs(chunk);
      T* copy = at_least(gathered, taps * chunk.count * from);
      T* const product = at_least(products, chunk.count * here);
      A.clear(), B.clear();
      for (const Index& t : chunk.phase->taps) {
        A.push_back(copy);
        B.push_back(matrices + (group * taps + gather.tap(t)) * from * row + first);
        for (const Run& run : runs) {
          gather.copy(run, t, in + group * from, all, from, copy);
          copy += run.count * from;
        }
      }
      const int64_t some = std::max<int64_t>(1, kDepth / from), terms = A.size();
      for (int64_t i = 0; i < std::max<int64_t>(1, terms); i += some)
        multiply(A.data() + i, B.data() + i, std::min(some, terms - i), from, 1, row, from, product, here, chunk.count,
                 here, i > 0);
      const T* sums = product;
      for (const Run& run : runs)
        for (int64_t i = 0; i < run.count; ++i, sums += here)
          std::copy_n(
              sums, wanted,
              result + (gather.first_pixel(run) + i * gather.pixel_step()) * to * g.groups + group * to + first);
    }
  });
  return out;
}

// In the memory format that torch's convolution would give. One axis is the last of two.
Tensor product(const Tensor& data, const Tensor& weight, IntArrayRef x_sizes, IntArrayRef y_sizes,
               const ConvGeometry& g, bool adjoint) {
  const auto contiguous = at::MemoryFormat::Contiguous, last = last_format(g.axes());
  if (g.axes() == 1) {
    const auto rows = [](IntArrayRef sizes) { return std::vector<int64_t>{sizes[0], sizes[1], 1, sizes[2]}; };
    return product(data.unsqueeze(2), weight.unsqueeze(2), rows(x_sizes), rows(y_sizes), of_rows(g), adjoint)
        .squeeze(2);
  }
  const Tensor result =
      (data.scalar_type() == at::kDouble ? product_of<double> : product_of<float>)(data, weight, x_sizes, y_sizes, g,
                                                                                   adjoint);
  const bool any_last = data.suggest_memory_format() == last || weight.suggest_memory_format() == last;
  return any_last ? result : to_format(result, contiguous);
}

}  // namespace

Tensor convolve_gathered(const Tensor& input, const Tensor& weight, const ConvGeometry& g) {
  return product(input, weight, input.sizes(), g.output_sizes(input.sizes(), weight.sizes()), g, false);
}

Tensor grad_input_gathered(const Tensor& grad_output, const Tensor& weight, IntArrayRef input_sizes,
                           const ConvGeometry& g) {
  return product(grad_output, weight, input_sizes, grad_output.sizes(), g, true);
}

}  // namespace convbn
