// y[p, o] = Σ x[p + shift(t), i]·w[o, t, i], its adjoint, and dw[o, t, i] = Σₚ dy[p, o]·x[p + shift(t), i], over the
// positions p of all images in one row.
//
// The images lie on a grid with as many empty cells behind each row (and plane, and image) as the padding is wide; the
// cells before a row are those behind the last one. So a tap is one shift for all positions, and what falls into an
// empty cell is zero. A list says for each position where its channels are. (For dw an empty cell of dy meets values of
// x, so an infinite x makes NaN of taps, too, that do not meet it.)
//
// Work is cut by the shape alone, into chunks of positions small enough for the L2 cache, times groups of channels. For
// dw the positions are first cut into slices, whose sums are added at the end, in order.
#include "convolution_amx.h"

#include <ATen/Parallel.h>

#include "amx.h"
#include "bn_blocks.h"

namespace convbn {

namespace {

using at::IntArrayRef;
using at::Tensor;

constexpr int64_t kUnits = 16;                 // of work, if the slices allow it
constexpr int64_t kGroup = 128;                // output channels; x is packed again for each group
constexpr int64_t kMostPositions = 640;        // of a chunk: dyᵀ of a tile's channels stays in the L1 cache
constexpr int64_t kChunkElements = 1 << 19;    // of a chunk's operands
constexpr int64_t kSmallPlane = 64;            // positions of an image: above, the library is as fast
constexpr int64_t kMostParts = 2 * (1 << 20);  // floats in all slices' sums

// The last axes of a tensor, as three.
struct Sizes : std::array<int64_t, 3> {
  Sizes(IntArrayRef values, int64_t fill) {
    std::fill(begin(), std::copy_backward(values.begin(), values.end(), end()), fill);
  }
};

struct Grid {
  Sizes in, out, cells;
  int64_t positions;  // of all images
  std::vector<int64_t> shifts;
  int64_t lead = 0;

  Grid(IntArrayRef input, IntArrayRef output, IntArrayRef weight, const ConvGeometry& g)
      : in(input.slice(2), 1), out(output.slice(2), 1), cells(in) {
    const Sizes kernel(weight.slice(2), 1), dilation(g.dilation, 1);
    Sizes before({}, 0);
    for (int64_t axis = 0; axis < g.axes(); ++axis) {
      const int64_t lo = g.padding[2 * axis], hi = g.padding[2 * axis + 1], i = axis + 3 - g.axes();
      before[i] = lo;
      cells[i] = std::max(in[i] + std::max(lo, hi), out[i]);
    }
    positions = input[0] * cells[0] * cells[1] * cells[2];
    for (int64_t d = 0; d < kernel[0]; ++d)
      for (int64_t h = 0; h < kernel[1]; ++h)
        for (int64_t w = 0; w < kernel[2]; ++w)
          shifts.push_back(((d * dilation[0] - before[0]) * cells[1] + h * dilation[1] - before[1]) * cells[2] +
                           w * dilation[2] - before[2]);
    for (const int64_t shift : shifts) lead = std::max(lead, std::abs(shift));
    lead += lead % 2;
  }

  // rows[i] = where the channels at position first + i of data (N, *size, channels) are; for an empty cell, zeros
  template <class T>
  void locate(T* data, const Sizes& size, int64_t channels, int64_t first, int64_t count, T* zeros, T** rows) const {
    for (int64_t i = 0; i < count;) {
      const int64_t p = first + i;
      if (p < 0 || p >= positions) {
        rows[i++] = zeros;
        continue;
      }
      const int64_t line = p / cells[2], h = line % cells[1], plane = line / cells[1], d = plane % cells[0];
      const bool inside = h < size[1] && d < size[0];
      T* const start = data + ((plane / cells[0] * size[0] + d) * size[1] + h) * size[2] * channels;
      for (int64_t w = p % cells[2]; w < cells[2] && i < count; ++w, ++i)
        rows[i] = inside && w < size[2] ? start + w * channels : zeros;
    }
  }
};

const uint16_t* bits(const Tensor& t) { return static_cast<const uint16_t*>(t.const_data_ptr()); }

int64_t pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }
int64_t tiled(int64_t positions) { return pieces(positions, kTilePositions) * kTilePositions; }

at::MemoryFormat channels_last(const ConvGeometry& g) {
  return g.axes() == 2 ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::ChannelsLast3d;
}

// Whether the kernels can do it: sizes of x and y, w as it is.
bool possible(const Tensor& like, IntArrayRef input, IntArrayRef output, const Tensor& weight, const ConvGeometry& g) {
  const auto one = [](int64_t stride) { return stride == 1; };
  return like.is_cpu() && like.scalar_type() == at::kBFloat16 && amx_available() && g.axes() >= 2 && g.groups == 1 &&
         std::all_of(g.stride.begin(), g.stride.end(), one) && like.is_contiguous(channels_last(g)) &&
         like.numel() > 0 && weight.size(0) >= 32 && weight.size(1) >= 32 &&
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
  const Sizes &from_size = adjoint ? grid.out : grid.in, &to_size = adjoint ? grid.in : grid.out;

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
      grid.locate(bits(data), from_size, from, first - grid.lead, positions + 2 * grid.lead, zeros.data(),
                  x_rows.data());
      grid.locate<uint16_t>(out_bits, to_size, to, first, positions, nullptr, y_rows.data());
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
  return !matrix_product && c10::multiply_integers(output_sizes.slice(2)) <= kSmallPlane &&
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
  return possible(input, input.sizes(), grad_output.sizes(), weight, g) && grad_output.is_contiguous(channels_last(g));
}

Tensor grad_weight_amx(const Tensor& grad_output, const Tensor& input, IntArrayRef weight_sizes,
                       const ConvGeometry& g) {
  const Grid grid(input.sizes(), grad_output.sizes(), weight_sizes, g);
  const int64_t in_channels = weight_sizes[1], out_channels = weight_sizes[0];
  const int64_t columns = padded_channels(in_channels), taps = static_cast<int64_t>(grid.shifts.size());
  const bool odd_shifts = std::any_of(grid.shifts.begin(), grid.shifts.end(), [](int64_t shift) { return shift % 2; });
  const int64_t part = padded_channels(out_channels) * taps * columns;
  const int64_t most_slices = std::clamp<int64_t>(kMostParts / part, 1, pieces(grid.positions, kMostPositions));
  const int64_t width = most_slices * pieces(out_channels, kGroup) < kUnits / 2 ? kGroup / 2 : kGroup;
  const int64_t groups = pieces(out_channels, width);
  const int64_t slice = tiled(pieces(grid.positions, std::clamp<int64_t>(kUnits / groups, 1, most_slices)));
  const int64_t slices = pieces(grid.positions, slice);
  const int64_t most = std::clamp<int64_t>(kChunkElements / (2 * columns + width) - 2 * grid.lead, 128, kMostPositions);
  const int64_t positions = tiled(pieces(slice, pieces(slice, most)));
  const Tensor parts = at::empty({slices, part}, at::kFloat);
  float* const sums = parts.mutable_data_ptr<float>();
  const std::vector<uint16_t> zeros(std::max(in_channels, out_channels), 0);

  at::parallel_for(0, slices * groups, 1, [&](int64_t begin, int64_t end) {
    thread_local AlignedVector<uint32_t> even, odd;
    thread_local AlignedVector<uint16_t> transposed;
    std::vector<const uint16_t*> x_rows(positions + 2 * grid.lead + 1), dy_rows(positions);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t group = unit % groups * width, first = unit / groups * slice;
      const int64_t last = std::min(first + slice, grid.positions);
      for (int64_t p = first; p < last; p += positions) {
        const int64_t mine = std::min(positions, last - p);
        GradWeightChunk chunk{x_rows.data(), dy_rows.data(),     tiled(mine),
                              grid.lead,     in_channels,        std::min(width, out_channels - group),
                              taps,          grid.shifts.data(), p == first};
        even.resize(chunk.pairs_size());
        if (odd_shifts) odd.resize(chunk.pairs_size());
        transposed.resize(chunk.transposed_size());
        chunk.even = even.data(), chunk.odd = odd_shifts ? odd.data() : nullptr, chunk.transposed = transposed.data();
        grid.locate(bits(input), grid.in, in_channels, p - grid.lead, chunk.positions + 2 * grid.lead + 1, zeros.data(),
                    x_rows.data());
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
