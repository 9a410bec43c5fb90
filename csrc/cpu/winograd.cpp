// Winograd's convolution. With tiles t, planes i = 0 … 15 and the transforms of winograd.inl
//   y:   V_i (t, C_in) = i-th of Bᵀ x B,  M_i = V_i U_i  with  U_i (C_in, C_out) of G w Gᵀ,  y = Aᵀ M A
//   dx:  the same with dy, wᵀ turned by 180° and the padding 2 − p
//   dw:  Gᵀ[Σ_t V_iᵀ D_i]G,  D_i (t, C_out) = i-th of A dy Aᵀ
// Tiles are 2 × 2, for y and dx of layers with many channels 4 × 4: fewer products, more rounding.
//
// Work is cut by the shape alone, into chunks of tiles, so many that the transformed weight, which passes through the
// caches once per chunk, is used often enough, times groups of blocks of 64 output channels. For dw the tiles are first
// cut into slices, whose sums are added at the end, in order. Matrices over output channels are stored block by block:
// (block, plane, row, up to 64 columns).
#include "winograd.h"

#include <ATen/Parallel.h>

#include <cstdlib>
#include <string_view>

#include "bn_blocks.h"
#include "isa.h"
#include "memory_format.h"

#define CONVBN_LOOPS "winograd.inl"
#include "each_isa.inl"

namespace convbn {

using at::IntArrayRef;
using at::Tensor;

namespace {

struct Loops {
  struct Transforms {  // for tiles of tile × tile results
    int64_t tile;
    decltype(&baseline::to_planes<baseline::InputAxis<2>>) input;
    decltype(&baseline::from_planes<baseline::OutputAxis<2>>) output;
    decltype(&baseline::transform_weight<baseline::WeightAxis<2>>) weight;
    int64_t planes() const { return (tile + 2) * (tile + 2); }
  } small, large;
  decltype(&baseline::to_planes<baseline::GradOutputAxis>) grad_output;
  decltype(&baseline::transform_grad_weight) grad_weight;
  decltype(&baseline::multiply) multiply;
};

#define TRANSFORMS_OF(isa, m)                                                  \
  {m, isa::to_planes<isa::InputAxis<m>>, isa::from_planes<isa::OutputAxis<m>>, \
   isa::transform_weight<isa::WeightAxis<m>>}
#define LOOPS_OF(isa)                                                                                              \
  Loops {                                                                                                          \
    TRANSFORMS_OF(isa, 2), TRANSFORMS_OF(isa, 4), isa::to_planes<isa::GradOutputAxis>, isa::transform_grad_weight, \
        isa::multiply                                                                                              \
  }
const Loops& loops() {
  static const Loops best = best_of(LOOPS_OF(baseline), LOOPS_OF(avx2), LOOPS_OF(avx512));
  return best;
}
#undef LOOPS_OF
#undef TRANSFORMS_OF

constexpr int64_t kBlock = 64;               // output channels
constexpr int64_t kTileStep = 6;             // tiles that the products take at once
constexpr int64_t kMostTiles = 128;          // of a chunk
constexpr int64_t kChunkElements = 1 << 21;  // of a chunk's transformed tiles
constexpr int64_t kInner = 128;              // rows of a weight's block that stay in the L1 cache
constexpr int64_t kRows = 16;                // rows of a weight that are transformed together
constexpr int64_t kUnits = 16;               // of work, if there are so many chunks or blocks
constexpr int64_t kMostParts = 1 << 21;      // floats in all slices' sums
constexpr int64_t kGap = 16;  // behind rows and planes: at powers of two they would push each other out of the caches

constexpr int64_t kWide = 384;  // channels whose sums round in the library's channels_last as much as large tiles do

// Where it is faster than the library, by measurements on both sides.
constexpr int64_t kLeastChannels = 32;
constexpr int64_t kWeightTiles = 16;                       // tiles that take as long as the transform of the weight
constexpr double kMostProducts = 0.65, kMostSmall = 0.55;  // of the definition's, with and without large tiles

struct Block {
  int64_t index, first, width;
  Block(int64_t index, int64_t channels)
      : index(index), first(index * kBlock), width(std::min(kBlock, channels - first)) {}
};

// Matrices of so many rows over output channels.
struct Matrices {
  int64_t planes, rows;
  int64_t plane(const Block& b) const { return rows * b.width + kGap; }
  int64_t offset(const Block& b) const { return planes * (rows * b.first + b.index * kGap); }
  int64_t size(int64_t channels) const { return planes * (rows * channels + pieces(channels, kBlock) * kGap); }
};

// The images' tiles in one row.
struct Tiles {
  int64_t size, rows, columns, count;
  Tiles(IntArrayRef result, int64_t size)
      : size(size),
        rows(pieces(result[2], size)),
        columns(pieces(result[3], size)),
        count(result[0] * rows * columns) {}

  // Where `reach` × `reach` pixels of each tile are in data (N, channels, H, W), from `top` rows above and `left`
  // columns left of the tile on; `empty` for those outside.
  template <class T>
  void locate(int64_t reach, T* data, IntArrayRef sizes, int64_t top, int64_t left, int64_t first, int64_t number,
              T* empty, T** pixels) const {
    const int64_t channels = sizes[1], height = sizes[2], width = sizes[3];
    for (int64_t t = first; t < first + number; ++t) {
      const int64_t line = t / columns, h0 = line % rows * size - top, w0 = t % columns * size - left;
      T* const image = data + line / rows * height * width * channels;
      for (int64_t h = h0; h < h0 + reach; ++h)
        for (int64_t w = w0; w < w0 + reach; ++w)
          *pixels++ = h >= 0 && h < height && w >= 0 && w < width ? image + (h * width + w) * channels : empty;
    }
  }
};

// Products for each pair of channels, those of the weight's transform included.
int64_t products(const Tiles& tiles) { return (tiles.size + 2) * (tiles.size + 2) * (tiles.count + kWeightTiles); }

// Tiles in a chunk with so many values to each.
int64_t chunk_tiles(int64_t tiles, int64_t values) {
  const int64_t most = std::clamp(kChunkElements / values, 2 * kTileStep, kMostTiles);
  return pieces(pieces(tiles, pieces(tiles, most)), kTileStep) * kTileStep;
}

// w (O, C, 3, 3) as taps (9, C, O).
Tensor taps_of(const Tensor& weight) {
  return to_format(
      weight.contiguous(at::MemoryFormat::ChannelsLast).permute({0, 2, 3, 1}).view({1, weight.size(0), 9, -1}),
      at::MemoryFormat::ChannelsLast);
}

// result = data ⋆ weight with `padding` or, for the adjoint, the transpose; U as described above.
Tensor product(const Tensor& data, const Tensor& weight, IntArrayRef sizes, int64_t top, int64_t left, bool adjoint,
               bool large) {
  const int64_t from = weight.size(adjoint ? 0 : 1), to = weight.size(adjoint ? 1 : 0), blocks = pieces(to, kBlock);
  const Tiles few(sizes, 4), many(sizes, 2);
  large = large && from >= kWide && products(few) < products(many);
  const Tiles& tiles = large ? few : many;
  const auto& transforms = large ? loops().large : loops().small;
  const int64_t planes = transforms.planes();
  const Tensor w = adjoint ? weight.contiguous(at::MemoryFormat::ChannelsLast) : taps_of(weight);
  const int64_t tap = adjoint ? to : from * to, row = adjoint ? 9 * to : to;
  const float* const w_data = w.const_data_ptr<float>();
  const Matrices u{planes, from};
  const Tensor transformed = at::empty({u.size(to)}, w.options());
  float* const U = transformed.mutable_data_ptr<float>();
  at::parallel_for(0, blocks * pieces(from, kRows), 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const Block b(unit % blocks, to);
      const int64_t r = unit / blocks * kRows;
      transforms.weight(w_data + r * row + b.first, tap, row, adjoint, std::min(kRows, from - r), b.width,
                        U + u.offset(b) + r * b.width, u.plane(b));
    }
  });

  const int64_t chunk = chunk_tiles(tiles.count, planes * from), chunks = pieces(tiles.count, chunk);
  const int64_t group = pieces(blocks, std::min(blocks, pieces(kUnits, chunks))), groups = pieces(blocks, group);
  const int64_t v_row = from + kGap, v_plane = chunk * v_row + kGap;
  const Matrices m{planes, chunk};
  Tensor out = at::empty(sizes, data.options().memory_format(at::MemoryFormat::ChannelsLast));
  const float* const in_data = data.const_data_ptr<float>();
  float* const out_data = out.mutable_data_ptr<float>();
  const std::vector<float> zeros(from, 0);
  at::parallel_for(0, chunks * groups, 1, [&](int64_t begin, int64_t end) {
    thread_local AlignedVector<float> V, M;
    V.resize(planes * v_plane), M.resize(m.size(kBlock));
    std::vector<const float*> pixels(chunk * planes);
    std::vector<float*> results(chunk * tiles.size * tiles.size);
    for (int64_t unit = begin, held = -1; unit < end; ++unit) {
      const int64_t first = unit / groups * chunk, number = std::min(chunk, tiles.count - first);
      if (held != first) {  // units of the same chunk follow each other
        tiles.locate(tiles.size + 2, in_data, data.sizes(), top, left, first, number, zeros.data(), pixels.data());
        tiles.locate<float>(tiles.size, out_data, sizes, 0, 0, first, number, nullptr, results.data());
        transforms.input(pixels.data(), 0, number, from, V.data(), v_plane, v_row);
        held = first;
      }
      const int64_t first_block = unit % groups * group;
      for (int64_t i = first_block; i < std::min(blocks, first_block + group); ++i) {
        const Block b(i, to);
        for (int64_t p = 0; p < planes; ++p)
          for (int64_t k = 0; k < from; k += kInner)
            loops().multiply(V.data() + p * v_plane + k, v_row, 1, U + u.offset(b) + p * u.plane(b) + k * b.width,
                             b.width, M.data() + p * m.plane(b), b.width, number, b.width, std::min(kInner, from - k),
                             k > 0);
        transforms.output(M.data(), m.plane(b), b.width, number, b.width, results.data(), b.first);
      }
    }
  });
  return out;
}

}  // namespace

bool suits_winograd(IntArrayRef input_sizes, IntArrayRef weight_sizes, const ConvGeometry& g, bool large) {
  static const bool wanted = [] {
    const char* setting = std::getenv("CONVBN_EXT_WINOGRAD");
    return !setting || std::string_view(setting) != "0";
  }();
  const auto all = [](IntArrayRef values, int64_t x) {
    return std::all_of(values.begin(), values.end(), [=](int64_t v) { return v == x; });
  };
  if (!wanted || g.axes() != 2 || g.groups != 1 || !all(g.stride, 1) || !all(g.dilation, 1) ||
      !all(weight_sizes.slice(2), 3) || g.pads_explicitly() || g.padding[0] > 2 || g.padding[2] > 2 ||
      weight_sizes[0] % 16 || weight_sizes[1] % 16)
    return false;
  const auto sizes = g.output_sizes(input_sizes, weight_sizes);
  return std::min(weight_sizes[0], weight_sizes[1]) >= kLeastChannels &&
         products(Tiles(sizes, 2)) <= (large ? kMostProducts : kMostSmall) * 9 * sizes[0] * sizes[2] * sizes[3];
}

Tensor convolve_winograd(const Tensor& input, const Tensor& weight, const ConvGeometry& g, bool large) {
  return product(input, weight, g.output_sizes(input.sizes(), weight.sizes()), g.padding[0], g.padding[2], false,
                 large);
}

Tensor grad_input_winograd(const Tensor& grad_output, const Tensor& weight, IntArrayRef input_sizes,
                           const ConvGeometry& g, bool large) {
  return product(grad_output, weight, input_sizes, 2 - g.padding[0], 2 - g.padding[2], true, large);
}

Tensor grad_weight_winograd(const Tensor& grad_output, const Tensor& input, IntArrayRef weight_sizes,
                            const ConvGeometry& g) {
  const Tiles tiles(grad_output.sizes(), 2);
  const auto& transforms = loops().small;
  const int64_t planes = transforms.planes();
  const int64_t from = weight_sizes[1], to = weight_sizes[0], blocks = pieces(to, kBlock);
  const Matrices u{planes, from};
  const int64_t part = u.size(to);
  const int64_t chunk = chunk_tiles(tiles.count, planes * (from + kBlock)), chunks = pieces(tiles.count, chunk);
  const int64_t most = std::min({kUnits, chunks, std::max<int64_t>(1, kMostParts / part)});
  const int64_t length = pieces(chunks, most), slices = pieces(chunks, length);  // in chunks
  const int64_t group = pieces(blocks, std::min(blocks, pieces(kUnits / 2, slices))), groups = pieces(blocks, group);
  const int64_t v_row = from + kGap, v_plane = chunk * v_row + kGap;
  const Matrices d{planes, chunk};
  const Tensor parts = at::empty({slices * part}, input.options());
  float* const sums = parts.mutable_data_ptr<float>();
  const float *const x_data = input.const_data_ptr<float>(), *const dy_data = grad_output.const_data_ptr<float>();
  const std::vector<float> zeros(std::max(from, to), 0);
  at::parallel_for(0, slices * groups, 1, [&](int64_t begin, int64_t end) {
    thread_local AlignedVector<float> V, D;
    V.resize(planes * v_plane), D.resize(d.size(kBlock));
    std::vector<const float*> x_pixels(chunk * 16), dy_pixels(chunk * 4);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t slice = unit / groups, first_block = unit % groups * group;
      for (int64_t c = slice * length; c < std::min(chunks, (slice + 1) * length); ++c) {
        const int64_t first = c * chunk, number = std::min(chunk, tiles.count - first);
        tiles.locate(4, x_data, input.sizes(), g.padding[0], g.padding[2], first, number, zeros.data(),
                     x_pixels.data());
        tiles.locate(2, dy_data, grad_output.sizes(), 0, 0, first, number, zeros.data(), dy_pixels.data());
        transforms.input(x_pixels.data(), 0, number, from, V.data(), v_plane, v_row);
        for (int64_t i = first_block; i < std::min(blocks, first_block + group); ++i) {
          const Block b(i, to);
          loops().grad_output(dy_pixels.data(), b.first, number, b.width, D.data(), d.plane(b), b.width);
          for (int64_t p = 0; p < planes; ++p)
            loops().multiply(V.data() + p * v_plane, 1, v_row, D.data() + p * d.plane(b), b.width,
                             sums + slice * part + u.offset(b) + p * u.plane(b), b.width, from, b.width, number,
                             c > slice * length);
        }
      }
    }
  });

  const Tensor taps = at::empty({1, to, 9, from}, input.options().memory_format(at::MemoryFormat::ChannelsLast));
  float* const dw = taps.mutable_data_ptr<float>();
  at::parallel_for(0, blocks * pieces(from, kRows), 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const Block b(unit % blocks, to);
      const int64_t r = unit / blocks * kRows;
      loops().grad_weight(sums + u.offset(b) + r * b.width, u.plane(b), slices, part, std::min(kRows, from - r),
                          b.width, dw + r * to + b.first, from * to, to);
    }
  });
  return to_format(taps, at::MemoryFormat::Contiguous).view({to, 3, 3, from}).permute({0, 3, 1, 2});
}

}  // namespace convbn
