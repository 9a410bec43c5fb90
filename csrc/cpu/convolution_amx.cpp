// y[p, o] = Σ x[p + shift(t), i]·w[o, t, i], its adjoint, and dw[o, t, i] = Σₚ dy[p, o]·x[p + shift(t), i], over the
// positions p of all images in one row.
//
// The images lie on a grid with as many empty cells behind each row (and plane, and image) as the padding is wide; the
// cells before a row are those behind the last one. So a tap is one shift for all positions, and what falls into an
// empty cell is zero. A list says for each position where its channels are. (For dw an empty cell of dy meets values of
// x, so an infinite x makes NaN of taps, too, that do not meet it.)
//
// Only dw knows strides s: the pixels a, a + s, a + 2s, ... of x are a phase of it, with which the taps that meet them
// form a convolution of stride 1. The phases lie one behind the other. Where rows (planes) are so long that a shift by
// one would be most of a chunk, the taps in another row (plane), too, meet phases of their own.
//
// Work is cut by the shape alone, into chunks of positions small enough for the L2 cache, times groups of channels. For
// dw the positions are first cut into slices, whose sums are added at the end, in order. Only dw knows groups of a
// convolution, which are work of their own.
#include "convolution_amx.h"

#include <ATen/Parallel.h>
#include <c10/util/generic_math.h>

#include "amx.h"
#include "bn_blocks.h"
#include "memory_format.h"

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
constexpr int64_t kMostParts = 2 * (1 << 20);  // floats in all slices' sums

// The last axes of a tensor, as three.
struct Sizes : std::array<int64_t, 3> {
  Sizes(IntArrayRef values, int64_t fill) {
    std::fill(begin(), std::copy_backward(values.begin(), values.end(), end()), fill);
  }
};

// Every step[i]-th pixel of images (N, *size, channels) along each axis, from begin[i] on.
struct Pixels {
  Sizes size, step{{}, 1}, begin{{}, 0};  // begin may be negative where the taps of an axis are apart
};

// Where pixels are, each with its channels side by side; pixels may overlap.
template <class T>
struct Images {
  T* data;
  int64_t stride;
  Sizes strides;
  Images(const Tensor& t, T* data) : data(data), stride(t.stride(0)), strides(t.strides().slice(2), 0) {}
  T* at(int64_t image, const std::array<int64_t, 3>& index) const {
    return data + image * stride + index[0] * strides[0] + index[1] * strides[1] + index[2] * strides[2];
  }
  Images from_channel(int64_t c) const {
    Images result = *this;
    result.data += c;
    return result;
  }
};

struct Grid {
  Pixels in, out;
  std::vector<Pixels> phases;  // of x, those that have taps
  std::vector<int64_t> phase;  // per tap, one of these
  std::vector<int64_t> shifts;
  Sizes cells;
  int64_t positions;  // of all images
  int64_t lead = 0;

  // The taps of the first `apart` of three axes are phases instead of shifts.
  Grid(IntArrayRef input, IntArrayRef output, IntArrayRef weight, const ConvGeometry& g, int apart = 0)
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
        shift[i] = i < apart ? 0 : c10::div_floor_integer(offset, stride[i]);
        pixels.begin[i] = offset - shift[i] * stride[i];
        if (i < apart) continue;
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

  // rows[i] = where the channels at position first + i are; for an empty cell, zeros
  template <class T>
  void locate(const Images<T>& images, const Pixels& of, int64_t first, int64_t count, T* zeros, T** rows) const {
    const auto& [size, step, begin] = of;
    for (int64_t i = 0; i < count;) {
      const int64_t p = first + i;
      if (p < 0 || p >= positions) {
        rows[i++] = zeros;
        continue;
      }
      const int64_t line = p / cells[2], plane = line / cells[1];
      const int64_t d = plane % cells[0] * step[0] + begin[0], h = line % cells[1] * step[1] + begin[1];
      const bool inside = h >= 0 && h < size[1] && d >= 0 && d < size[0];
      const int64_t filled = inside ? pieces(size[2] - begin[2], step[2]) : 0;  // cells of the line
      T* const start = images.at(plane / cells[0], {d, h, begin[2]});
      const int64_t cell = p % cells[2], next = i - cell + std::min(cells[2], cell + count - i);
      const int64_t end = std::clamp(i - cell + filled, i, next);
      for (int64_t w = cell; i < end; ++w, ++i) rows[i] = start + w * step[2] * images.strides[2];
      for (; i < next; ++i) rows[i] = zeros;
    }
  }
};

const uint16_t* bits(const Tensor& t) { return static_cast<const uint16_t*>(t.const_data_ptr()); }
Images<const uint16_t> images(const Tensor& t) { return {t, bits(t)}; }

int64_t tiled(int64_t positions) { return pieces(positions, kTilePositions) * kTilePositions; }

// With the channels of a pixel side by side
Tensor pixels(const Tensor& t) { return t.stride(1) == 1 ? t : to_format(t, last_format(t.dim() - 2)); }

bool possible(const Tensor& like, const ConvGeometry& g) {
  return like.is_cpu() && like.scalar_type() == at::kBFloat16 && amx_available() && g.axes() >= 2 && like.numel() > 0;
}

// A grid for dw whose shifts are not too long, if there is one.
Grid grad_weight_grid(IntArrayRef input, IntArrayRef output, IntArrayRef weight, const ConvGeometry& g) {
  for (int apart = 0;; ++apart) {
    Grid grid(input, output, weight, g, apart);
    if (grid.lead <= kMostPositions || apart == 2) return grid;
  }
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

  const Tensor w = weight.contiguous(last_format(g.axes()));
  AlignedVector<uint32_t> packed(packed_weight_size(weight.size(0), taps, weight.size(1)));
  at::parallel_for(0, pieces(weight.size(0), kTileChannels), 1, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin * kTileChannels; o < end * kTileChannels; o += kTileChannels)
      amx_pack_weight(bits(w), weight.size(0), taps, weight.size(1), adjoint, o, packed.data());
  });

  const int64_t most = std::clamp<int64_t>(kChunkElements / padded_channels(from) - 2 * grid.lead, 128, kMostPositions);
  const int64_t chunks = pieces(grid.positions, most);
  const int64_t positions = tiled(pieces(grid.positions, chunks));
  const int64_t groups = pieces(to, kGroup);
  Tensor out = at::empty(adjoint ? input_sizes : output_sizes, data.options().memory_format(last_format(g.axes())));
  const Images<uint16_t> results(out, static_cast<uint16_t*>(out.mutable_data_ptr()));
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
      grid.locate(images(data), from_pixels, first - grid.lead, positions + 2 * grid.lead, zeros.data(), x_rows.data());
      grid.locate<uint16_t>(results, to_pixels, first, positions, nullptr, y_rows.data());
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
  return !matrix_product && g.groups == 1 && std::all_of(g.stride.begin(), g.stride.end(), one) &&
         std::min(weight.size(0), weight.size(1)) >= kTileChannels &&
         c10::multiply_integers(output_sizes.slice(2)) <= kSmallPlane && possible(like, g) &&
         like.is_contiguous(last_format(g.axes())) &&
         Grid(input_sizes, output_sizes, weight.sizes(), g).lead <= kMostPositions;
}

Tensor convolve_amx(const Tensor& input, const Tensor& weight, const ConvGeometry& g) {
  return product(input, weight, input.sizes(), g.output_sizes(input.sizes(), weight.sizes()), g, false);
}

Tensor grad_input_amx(const Tensor& grad_output, const Tensor& weight, IntArrayRef input_sizes, const ConvGeometry& g) {
  return product(grad_output, weight, input_sizes, grad_output.sizes(), g, true);
}

bool takes_grad_weight_amx(const Tensor& grad_output, const Tensor& input, IntArrayRef weight_sizes,
                           const ConvGeometry& g) {
  return possible(input, g) &&
         grad_weight_grid(input.sizes(), grad_output.sizes(), weight_sizes, g).lead <= kMostPositions;
}

// Few channels: with the taps of a row as channels, of pixels that overlap between columns of zeros.
static Tensor grad_weight_of_rows(const Tensor& grad_output, const Tensor& input, IntArrayRef sizes,
                                  const ConvGeometry& g) {
  const int64_t axes = g.axes(), taps = sizes.back(), from = sizes[1], padding = g.padding[2 * axes - 2];
  const Tensor last = to_format(input, last_format(axes)).movedim(1, -1);
  const Tensor x = at::constant_pad_nd(last, {0, 0, padding, padding}).contiguous();
  std::vector<int64_t> x_sizes = input.sizes().vec(), x_strides = x.strides().vec(), w_sizes = sizes.vec();
  x_sizes[1] = w_sizes[1] = taps * from, x_sizes.back() = grad_output.sizes().back(), w_sizes.back() = 1;
  x_strides.pop_back(), x_strides.back() *= g.stride.back();
  x_strides.insert(x_strides.begin() + 1, 1);
  ConvGeometry rows = g;
  rows.stride.back() = 1, rows.padding[2 * axes - 2] = rows.padding[2 * axes - 1] = 0;
  const Tensor dw = grad_weight_amx(grad_output, x.as_strided(x_sizes, x_strides), w_sizes, rows);
  return dw.squeeze(-1).unflatten(1, {taps, from}).movedim(1, -1);
}

Tensor grad_weight_amx(const Tensor& grad_output, const Tensor& input, IntArrayRef weight_sizes,
                       const ConvGeometry& g) {
  if (weight_sizes.back() > 1 && weight_sizes[1] * weight_sizes.back() <= kTileChannels && g.groups == 1 &&
      g.dilation.back() == 1)
    return grad_weight_of_rows(grad_output, input, weight_sizes, g);
  const Tensor dy = pixels(grad_output), x = pixels(input);
  const Grid grid = grad_weight_grid(input.sizes(), grad_output.sizes(), weight_sizes, g);
  const int64_t from = weight_sizes[1], to = weight_sizes[0] / g.groups;  // channels of a group
  const int64_t columns = padded_channels(from), taps = static_cast<int64_t>(grid.shifts.size());
  const int64_t phases = static_cast<int64_t>(grid.phases.size());
  const bool odd_shifts = std::any_of(grid.shifts.begin(), grid.shifts.end(), [](int64_t shift) { return shift % 2; });
  const int64_t part = padded_channels(to) * taps * columns;  // of a slice and a group
  const int64_t most_slices =
      std::clamp<int64_t>(kMostParts / (part * g.groups), 1, pieces(grid.positions, kMostPositions));
  int64_t width = kWidestGroup;
  while (width > kGroup / 2 && most_slices * g.groups * pieces(to, width) < kUnits / 2) width /= 2;
  const int64_t blocks = pieces(to, width), units = g.groups * blocks;
  const int64_t slice = tiled(pieces(grid.positions, std::clamp<int64_t>(kUnits / units, 1, most_slices)));
  const int64_t slices = pieces(grid.positions, slice);
  const int64_t most =
      std::clamp<int64_t>(kChunkElements / (2 * phases * columns + width) - 2 * grid.lead, 128, kMostPositions);
  const int64_t positions = tiled(pieces(slice, pieces(slice, most)));
  const Tensor parts = at::empty({slices, g.groups * part}, at::kFloat);
  float* const sums = parts.mutable_data_ptr<float>();
  const std::vector<uint16_t> zeros(std::max(from, to), 0);

  at::parallel_for(0, slices * units, 1, [&](int64_t begin, int64_t end) {
    thread_local AlignedVector<uint32_t> even, odd;
    thread_local AlignedVector<uint16_t> transposed;
    std::vector<const uint16_t*> x_rows(phases * (positions + 2 * grid.lead) + 1, zeros.data()), dy_rows(positions);
    std::vector<int64_t> starts(taps);
    for (int64_t work = begin; work < end; ++work) {
      const int64_t group = work % units / blocks, o = work % blocks * width, first = work / units * slice;
      const int64_t last = std::min(first + slice, grid.positions);
      for (int64_t p = first; p < last; p += positions) {
        const int64_t mine = std::min(positions, last - p), span = tiled(mine) + 2 * grid.lead;
        for (int64_t t = 0; t < taps; ++t) starts[t] = grid.phase[t] * span + grid.lead + grid.shifts[t];
        GradWeightChunk chunk{x_rows.data(),           dy_rows.data(), phases * span, tiled(mine), from,
                              std::min(width, to - o), taps,           starts.data(), p == first};
        even.resize(chunk.pairs_size());
        if (odd_shifts) odd.resize(chunk.pairs_size());
        transposed.resize(chunk.transposed_size());
        chunk.even = even.data(), chunk.odd = odd_shifts ? odd.data() : nullptr, chunk.transposed = transposed.data();
        for (int64_t f = 0; f < phases; ++f)
          grid.locate(images(x).from_channel(group * from), grid.phases[f], p - grid.lead, span, zeros.data(),
                      x_rows.data() + f * span);
        // beyond the slice dy is zero: the next unit has it
        grid.locate(images(dy).from_channel(group * to + o), grid.out, p, mine, zeros.data(), dy_rows.data());
        std::fill(dy_rows.begin() + mine, dy_rows.end(), zeros.data());
        amx_grad_weight(chunk, sums + (work / units * g.groups + group) * part + o * taps * columns);
      }
    }
  });

  Tensor dw = at::empty(weight_sizes, input.options().memory_format(last_format(g.axes())));
  auto* const out = static_cast<uint16_t*>(dw.mutable_data_ptr());
  at::parallel_for(0, weight_sizes[0] * taps, 64, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t group = row / taps / to, of_group = row - group * to * taps;
      amx_sum_slices(sums + group * part + of_group * columns, slices, parts.size(1), from, out + row * from);
    }
  });
  return dw;
}

}  // namespace convbn
