// y[p, o] = Σ x[p + shift(t), i]·w[o, t, i], its adjoint, and dw[o, t, i] = Σₚ dy[p, o]·x[p + shift(t), i], over the
// positions p of all images in one row.
//
// The images lie on a grid with as many empty cells behind each row (and plane, and image) as the padding is wide; the
// cells before a row are those behind the last one. So a tap is one shift for all positions, and what falls into an
// empty cell is zero. A list says for each position where its channels are. (For dw an empty cell of dy meets values of
// x, so an infinite x makes NaN of taps, too, that do not meet it.)
//
// Only dw knows strides s: the pixels a, a + s, a + 2s, ... of x are a phase of it, with which the taps that meet them
// form a convolution of stride 1. The phases lie one behind the other.
//
// Work is cut by the shape alone, into chunks of positions small enough for the L2 cache, times groups of channels. For
// dw the positions are first cut into slices, whose sums are added at the end, in order.
#include "convolution_amx.h"

#include <ATen/Parallel.h>
#include <c10/util/generic_math.h>

#include "amx.h"
#include "bn_blocks.h"

namespace convbn {

namespace {

using at::IntArrayRef;
using at::Tensor;

constexpr int64_t kUnits = 16;                 // of work, if the slices allow it
constexpr int64_t kGroup = 128;                // output channels; x is packed again for each group
constexpr int64_t kWidestGroup = 256;          // for dw, if there is work enough
constexpr int64_t kMostPositions = 640;        // of a chunk: dyᵀ of a tile's channels stays in the L1 cache
constexpr int64_t kChunkElements = 1 << 19;    // of a chunk's operands
constexpr int64_t kSmallPlane = 64;            // positions of an image: above, the library is as fast
constexpr int64_t kLeastChannels = 16;         // for dw: fewer leave too much of a tile empty,
constexpr int64_t kFewPositions = 1 << 13;     // but with so few of dy the library needs longer to begin
constexpr int64_t kMostParts = 2 * (1 << 20);  // floats in all slices' sums

// The last axes of a tensor, as three.
struct Sizes : std::array<int64_t, 3> {
  Sizes(IntArrayRef values, int64_t fill) {
    std::fill(begin(), std::copy_backward(values.begin(), values.end(), end()), fill);
  }
};

// Every step[i]-th pixel of images (N, *size, channels) along each axis, from begin[i] on.
struct Pixels {
  Sizes size, step{{}, 1}, begin{{}, 0};
};

struct Grid {
  Pixels in, out;
  std::vector<Pixels> phases;  // of x, those that have taps
  std::vector<int64_t> phase;  // per tap, one of these
  std::vector<int64_t> shifts;
  Sizes cells;
  int64_t positions;  // of all images
  int64_t lead = 0;

  Grid(IntArrayRef input, IntArrayRef output, IntArrayRef weight, const ConvGeometry& g)
      : in{{input.slice(2), 1}}, out{{output.slice(2), 1}}, cells(out.size) {
    const Sizes kernel(weight.slice(2), 1), dilation(g.dilation, 1), stride(g.stride, 1);
    Sizes before({}, 0);
    for (int64_t axis = 0; axis < g.axes(); ++axis) before[axis + 3 - g.axes()] = g.padding[2 * axis];
    // Tap i of an axis meets x at  stride·h + i·dilation − before = stride·(h + shift) + begin,  0 ≤ begin < stride.
    std::vector<Sizes> tap_shifts;
    for (int64_t tap = 0; tap < c10::multiply_integers(kernel); ++tap) {
      const std::array<int64_t, 3> index{tap / kernel[2] / kernel[1], tap / kernel[2] % kernel[1], tap % kernel[2]};
      Sizes shift({}, 0);
      Pixels pixels{in.size, stride};
      for (int i = 0; i < 3; ++i) {
        const int64_t offset = index[i] * dilation[i] - before[i];
        shift[i] = c10::div_floor_integer(offset, stride[i]);
        pixels.begin[i] = offset - shift[i] * stride[i];
        const int64_t extent = pieces(in.size[i] - pixels.begin[i], stride[i]);
        cells[i] = std::max({cells[i], out.size[i] + shift[i], extent - shift[i]});
      }
      const auto known =
          std::find_if(phases.begin(), phases.end(), [&](const Pixels& p) { return p.begin == pixels.begin; });
      phase.push_back(known - phases.begin());
      if (known == phases.end()) phases.push_back(pixels);
      tap_shifts.push_back(shift);
    }
    positions = input[0] * c10::multiply_integers(cells);
    for (const Sizes& shift : tap_shifts) {
      shifts.push_back((shift[0] * cells[1] + shift[1]) * cells[2] + shift[2]);
      lead = std::max(lead, std::abs(shifts.back()));
    }
    lead += lead % 2;
  }

  // rows[i] = where the channels at position first + i of data (N, *size, channels) are; for an empty cell, zeros
  template <class T>
  void locate(T* data, const Pixels& of, int64_t channels, int64_t first, int64_t count, T* zeros, T** rows) const {
    const auto& [size, step, begin] = of;
    for (int64_t i = 0; i < count;) {
      const int64_t p = first + i;
      if (p < 0 || p >= positions) {
        rows[i++] = zeros;
        continue;
      }
      const int64_t line = p / cells[2], plane = line / cells[1];
      const int64_t d = plane % cells[0] * step[0] + begin[0], h = line % cells[1] * step[1] + begin[1];
      const int64_t filled = h < size[1] && d < size[0] ? pieces(size[2] - begin[2], step[2]) : 0;  // cells of the line
      T* const start = data + (((plane / cells[0] * size[0] + d) * size[1] + h) * size[2] + begin[2]) * channels;
      const int64_t cell = p % cells[2], next = i - cell + std::min(cells[2], cell + count - i);
      const int64_t end = std::clamp(i - cell + filled, i, next);
      for (int64_t w = cell; i < end; ++w, ++i) rows[i] = start + w * step[2] * channels;
      for (; i < next; ++i) rows[i] = zeros;
    }
  }
};

const uint16_t* bits(const Tensor& t) { return static_cast<const uint16_t*>(t.const_data_ptr()); }

int64_t tiled(int64_t positions) { return pieces(positions, kTilePositions) * kTilePositions; }

at::MemoryFormat channels_last(const ConvGeometry& g) {
  return g.axes() == 2 ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::ChannelsLast3d;
}

// Whether the kernels can do it: sizes of x and y, w as it is.
bool possible(const Tensor& like, IntArrayRef input, IntArrayRef output, const Tensor& weight, const ConvGeometry& g) {
  return like.is_cpu() && like.scalar_type() == at::kBFloat16 && amx_available() && g.axes() >= 2 && g.groups == 1 &&
         like.is_contiguous(channels_last(g)) && like.numel() > 0 &&
         Grid(input, output, weight.sizes(), g).lead <= kMostPositions;
}

// out = data ⋆ weight or, for the adjoint, its transpose; data and out at the sizes of x and y or the other way round.
Tensor product(const Tensor& data, const Tensor& weight, IntArrayRef input_sizes, IntArrayRef output_sizes,
               const ConvGeometry& g, bool adjoint) {
  Grid grid(input_sizes, output_sizes, weight.sizes(), g);
  const int64_t taps = static_cast<int64_t>(grid.shifts.size());
  if (adjoint)
    for (int64_t& shift : grid.shifts) shift = -shift;
  const int64_t from = weight.size(adjoint ? 0 : 1), to = weight.size(adjoint ? 1 : 0);
  const Pixels &from_pixels = adjoint ? grid.out : grid.in, &to_pixels = adjoint ? grid.in : grid.out;

  const Tensor w = weight.contiguous(channels_last(g));
  AlignedVector<uint32_t> packed(packed_weight_size(weight.size(0), taps, weight.size(1)));
  at::parallel_for(0, pieces(weight.size(0), kTileChannels), 1, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin * kTileChannels; o < end * kTileChannels; o += kTileChannels)
      amx_pack_weight(bits(w), weight.size(0), taps, weight.size(1), adjoint, o, packed.data());
  });

  const int64_t most = std::clamp<int64_t>(kChunkElements / padded_channels(from) - 2 * grid.lead, 128, kMostPositions);
  const int64_t chunks = pieces(grid.positions, most);
  const int64_t positions = tiled(pieces(grid.positions, chunks));
  const int64_t groups = pieces(to, kGroup);
  Tensor out = at::empty(adjoint ? input_sizes : output_sizes, data.options().memory_format(channels_last(g)));
  auto* const out_bits = static_cast<uint16_t*>(out.mutable_data_ptr());
  const std::vector<uint16_t> zeros(from, 0);
  at::parallel_for(0, chunks * groups, 1, [&](int64_t begin, int64_t end) {
    thread_local AlignedVector<uint16_t> copy;
    std::vector<const uint16_t*> x_rows(positions + 2 * grid.lead);
    std::vector<uint16_t*> y_rows(positions);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t group = unit % groups * kGroup, first = unit / groups * positions;
      ConvolveChunk chunk{x_rows.data(),
                          y_rows.data(),
                          positions,
                          grid.lead,
                          from,
                          std::min(kGroup, to - group),
                          taps,
                          grid.shifts.data(),
                          packed.data() + packed_weight_size(group, taps, from)};
      copy.resize(chunk.copy_size());
      chunk.copy = copy.data();
      grid.locate(bits(data), from_pixels, from, first - grid.lead, positions + 2 * grid.lead, zeros.data(),
                  x_rows.data());
      grid.locate<uint16_t>(out_bits, to_pixels, to, first, positions, nullptr, y_rows.data());
      for (uint16_t*& row : y_rows)
        if (row) row += group;
      amx_convolve(chunk);
    }
  });
  return out;
}

}  // namespace

bool takes_convolve_amx(const Tensor& like, const Tensor& weight, IntArrayRef input_sizes, IntArrayRef output_sizes,
                        const ConvGeometry& g) {
  const bool matrix_product = weight.numel() == weight.size(0) * weight.size(1);
  const auto one = [](int64_t stride) { return stride == 1; };
  return !matrix_product && std::all_of(g.stride.begin(), g.stride.end(), one) &&
         std::min(weight.size(0), weight.size(1)) >= kTileChannels &&
         c10::multiply_integers(output_sizes.slice(2)) <= kSmallPlane &&
         possible(like, input_sizes, output_sizes, weight, g);
}

Tensor convolve_amx(const Tensor& input, const Tensor& weight, const ConvGeometry& g) {
  return product(input, weight, input.sizes(), g.output_sizes(input.sizes(), weight.sizes()), g, false);
}

Tensor grad_input_amx(const Tensor& grad_output, const Tensor& weight, IntArrayRef input_sizes, const ConvGeometry& g) {
  return product(grad_output, weight, input_sizes, grad_output.sizes(), g, true);
}

bool takes_grad_weight_amx(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                           const ConvGeometry& g) {
  const bool few_positions = grad_output.numel() <= kFewPositions * grad_output.size(1);
  return (few_positions || std::min(weight.size(0), weight.size(1)) >= kLeastChannels) &&
         possible(input, input.sizes(), grad_output.sizes(), weight, g) && grad_output.is_contiguous(channels_last(g));
}

Tensor grad_weight_amx(const Tensor& grad_output, const Tensor& input, IntArrayRef weight_sizes,
                       const ConvGeometry& g) {
  const Grid grid(input.sizes(), grad_output.sizes(), weight_sizes, g);
  const int64_t in_channels = weight_sizes[1], out_channels = weight_sizes[0];
  const int64_t columns = padded_channels(in_channels), taps = static_cast<int64_t>(grid.shifts.size());
  const int64_t phases = static_cast<int64_t>(grid.phases.size());
  const bool odd_shifts = std::any_of(grid.shifts.begin(), grid.shifts.end(), [](int64_t shift) { return shift % 2; });
  const int64_t part = padded_channels(out_channels) * taps * columns;
  const int64_t most_slices = std::clamp<int64_t>(kMostParts / part, 1, pieces(grid.positions, kMostPositions));
  int64_t width = kWidestGroup;
  while (width > kGroup / 2 && most_slices * pieces(out_channels, width) < kUnits / 2) width /= 2;
  const int64_t groups = pieces(out_channels, width);
  const int64_t slice = tiled(pieces(grid.positions, std::clamp<int64_t>(kUnits / groups, 1, most_slices)));
  const int64_t slices = pieces(grid.positions, slice);
  const int64_t most =
      std::clamp<int64_t>(kChunkElements / (2 * phases * columns + width) - 2 * grid.lead, 128, kMostPositions);
  const int64_t positions = tiled(pieces(slice, pieces(slice, most)));
  const Tensor parts = at::empty({slices, part}, at::kFloat);
  float* const sums = parts.mutable_data_ptr<float>();
  const std::vector<uint16_t> zeros(std::max(in_channels, out_channels), 0);

  at::parallel_for(0, slices * groups, 1, [&](int64_t begin, int64_t end) {
    thread_local AlignedVector<uint32_t> even, odd;
    thread_local AlignedVector<uint16_t> transposed;
    std::vector<const uint16_t*> x_rows(phases * (positions + 2 * grid.lead) + 1, zeros.data()), dy_rows(positions);
    std::vector<int64_t> starts(taps);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t group = unit % groups * width, first = unit / groups * slice;
      const int64_t last = std::min(first + slice, grid.positions);
      for (int64_t p = first; p < last; p += positions) {
        const int64_t mine = std::min(positions, last - p), span = tiled(mine) + 2 * grid.lead;
        for (int64_t t = 0; t < taps; ++t) starts[t] = grid.phase[t] * span + grid.lead + grid.shifts[t];
        GradWeightChunk chunk{x_rows.data(), dy_rows.data(), phases * span,
                              tiled(mine),   in_channels,    std::min(width, out_channels - group),
                              taps,          starts.data(),  p == first};
        even.resize(chunk.pairs_size());
        if (odd_shifts) odd.resize(chunk.pairs_size());
        transposed.resize(chunk.transposed_size());
        chunk.even = even.data(), chunk.odd = odd_shifts ? odd.data() : nullptr, chunk.transposed = transposed.data();
        for (int64_t f = 0; f < phases; ++f)
          grid.locate(bits(input), grid.phases[f], in_channels, p - grid.lead, span, zeros.data(),
                      x_rows.data() + f * span);
        // beyond the slice dy is zero: the next unit has it
        grid.locate(bits(grad_output) + group, grid.out, out_channels, p, mine, zeros.data(), dy_rows.data());
        std::fill(dy_rows.begin() + mine, dy_rows.end(), zeros.data());
        amx_grad_weight(chunk, sums + unit / groups * part + group * taps * columns);
      }
    }
  });

  Tensor dw = at::empty(weight_sizes, input.options().memory_format(channels_last(g)));
  auto* const out = static_cast<uint16_t*>(dw.mutable_data_ptr());
  at::parallel_for(0, out_channels * taps, 64, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      amx_sum_slices(sums + row * columns, slices, part, in_channels, out + row * in_channels);
  });
  return dw;
}

}  // namespace convbn
