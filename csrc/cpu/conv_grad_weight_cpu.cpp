// dw[o, t, i] = Σₚ dy[p, o]·x[p + shift(t), i] over the positions p of all images in one row.
//
// The images lie on a grid with as many empty cells behind each row (and plane, and image) as the padding is wide; the
// cells before a row are those behind the last one. So a tap is one shift for all positions, and what falls into an
// empty cell is zero. Nothing is stored that way: a list says for each position where its channels are.
//
// The sum is cut into slices of positions and groups of output channels, whose number depends on the shape alone; a
// unit of work is one of each. A unit goes through its slice chunk by chunk, small enough for the L2 cache.
#include "conv_grad_weight_cpu.h"

#include <ATen/Parallel.h>

#include "amx.h"
#include "bn_blocks.h"

namespace convbn {

namespace {

using at::IntArrayRef;
using at::Tensor;

constexpr int64_t kUnits = 32;                 // enough for the threads of most machines
constexpr int64_t kGroup = 128;                // output channels; x is packed again for each group
constexpr int64_t kMostPositions = 640;        // of a chunk: dyᵀ of a tile's channels stays in the L1 cache
constexpr int64_t kChunkElements = 1 << 19;    // of a chunk's operands
constexpr int64_t kMostParts = 4 * (1 << 20);  // floats in all slices' sums

// The last axes of a tensor, as three.
struct Sizes : std::array<int64_t, 3> {
  Sizes(IntArrayRef values, int64_t fill) {
    fill_front(values.size(), fill);
    std::copy(values.begin(), values.end(), end() - values.size());
  }

 private:
  void fill_front(size_t given, int64_t value) { std::fill(begin(), end() - given, value); }
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

  // rows[i] = where the channels at position first + i of data (N, *size, channels) are; zeros for an empty cell
  void locate(const uint16_t* data, const Sizes& size, int64_t channels, int64_t first, int64_t count,
              const uint16_t* zeros, const uint16_t** rows) const {
    for (int64_t i = 0; i < count;) {
      const int64_t p = first + i;
      if (p < 0 || p >= positions) {
        rows[i++] = zeros;
        continue;
      }
      const int64_t line = p / cells[2], h = line % cells[1], plane = line / cells[1], d = plane % cells[0];
      const bool inside = h < size[1] && d < size[0];
      const uint16_t* start = data + ((plane / cells[0] * size[0] + d) * size[1] + h) * size[2] * channels;
      for (int64_t w = p % cells[2]; w < cells[2] && i < count; ++w, ++i)
        rows[i] = inside && w < size[2] ? start + w * channels : zeros;
    }
  }
};

const uint16_t* bits(const Tensor& t) { return static_cast<const uint16_t*>(t.const_data_ptr()); }

int64_t pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }

at::MemoryFormat channels_last(const ConvGeometry& g) {
  return g.axes() == 2 ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::ChannelsLast3d;
}

}  // namespace

bool takes_grad_weight_amx(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                           const ConvGeometry& g) {
  const auto one = [](int64_t stride) { return stride == 1; };
  return input.is_cpu() && input.scalar_type() == at::kBFloat16 && g.axes() >= 2 && g.groups == 1 &&
         std::all_of(g.stride.begin(), g.stride.end(), one) && input.is_contiguous(channels_last(g)) &&
         grad_output.is_contiguous(channels_last(g)) && weight.size(0) >= 32 && weight.size(1) >= 32 &&
         input.numel() > 0 && grad_output.numel() > 0 &&
         Grid(input.sizes(), grad_output.sizes(), weight.sizes(), g).lead <= kMostPositions && amx_available();
}

Tensor grad_weight_amx(const Tensor& grad_output, const Tensor& input, IntArrayRef weight_sizes,
                       const ConvGeometry& g) {
  const Grid grid(input.sizes(), grad_output.sizes(), weight_sizes, g);
  const int64_t in_channels = weight_sizes[1], out_channels = weight_sizes[0];
  const int64_t columns = GradWeightChunk::padded(in_channels), taps = static_cast<int64_t>(grid.shifts.size());
  const bool odd_shifts = std::any_of(grid.shifts.begin(), grid.shifts.end(), [](int64_t shift) { return shift % 2; });
  const int64_t part = GradWeightChunk::padded(out_channels) * taps * columns;
  const int64_t groups = pieces(out_channels, kGroup);
  const int64_t slices =
      std::clamp<int64_t>(std::min(kUnits / groups, kMostParts / part), 1, pieces(grid.positions, kMostPositions));
  const int64_t slice = pieces(pieces(grid.positions, slices), kTilePositions) * kTilePositions;
  const int64_t most =
      std::clamp<int64_t>(kChunkElements / (2 * columns + kGroup) - 2 * grid.lead, 128, kMostPositions);
  const int64_t positions = pieces(pieces(slice, pieces(slice, most)), kTilePositions) * kTilePositions;
  const Tensor parts = at::zeros({slices, part}, at::kFloat);
  float* const sums = parts.mutable_data_ptr<float>();
  const std::vector<uint16_t> zeros(std::max(in_channels, out_channels), 0);

  at::parallel_for(0, slices * groups, 1, [&](int64_t begin, int64_t end) {
    thread_local AlignedVector<uint32_t> even, odd;
    thread_local AlignedVector<uint16_t> transposed;
    std::vector<const uint16_t*> x_rows(positions + 2 * grid.lead + 1), dy_rows(positions);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t group = unit % groups * kGroup, first = unit / groups * slice;
      GradWeightChunk chunk{x_rows.data(), dy_rows.data(),    positions,
                            grid.lead,     in_channels,       std::min(kGroup, out_channels - group),
                            taps,          grid.shifts.data()};
      even.resize(chunk.pairs_size());
      if (odd_shifts) odd.resize(chunk.pairs_size());
      transposed.resize(chunk.transposed_size());
      chunk.even = even.data(), chunk.odd = odd_shifts ? odd.data() : nullptr, chunk.transposed = transposed.data();
      for (int64_t p = first; p < std::min(first + slice, grid.positions); p += positions) {
        grid.locate(bits(input), grid.in, in_channels, p - grid.lead, positions + 2 * grid.lead + 1, zeros.data(),
                    x_rows.data());
        // beyond the slice dy is zero: the next unit has it
        const int64_t mine = std::min(positions, first + slice - p);
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
