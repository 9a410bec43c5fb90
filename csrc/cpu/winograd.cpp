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
//
// Where the weight has so many channels that its transform does not fit a cache, tiles go through each step together:
// all transforms, then all products, cut into planes times bands of tiles or blocks, then all results.
#include "winograd.h"

#include <ATen/Parallel.h>

#include <cstdlib>
#include <string_view>

#include "bn_blocks.h"
#include "isa.h"
#include "memory_format.h"
#include "winograd_tiles.h"

#define CONVBN_LOOPS "winograd.inl"
#include "each_isa.inl"

namespace convbn {

using at::IntArrayRef;
using at::Tensor;
using namespace winograd;

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

constexpr int64_t kTileStep = 6;             // tiles that the products take at once
constexpr int64_t kMostTiles = 128;          // of a chunk
constexpr int64_t kChunkElements = 1 << 21;  // of a chunk's transformed tiles
constexpr int64_t kInner = 128;              // rows of a weight's block that stay in the L1 cache
constexpr int64_t kRows = 16;                // rows of a weight that are transformed together
constexpr int64_t kUnits = 16;               // of work, if there are so many chunks or blocks
constexpr int64_t kMostParts = 1 << 21;      // floats in all slices' sums
constexpr int64_t kHeavyWeight = 1 << 17;    // pairs of channels
constexpr int64_t kTogether = 512;           // tiles that go through each step together
constexpr int64_t kStep = 16;                // of them, transformed at once

constexpr int64_t kWide = 384;  // channels whose sums round in the library's channels_last as much as large tiles do

// Where it is faster than the library, by measurements on both sides.
constexpr int64_t kLeastChannels = 32;
constexpr int64_t kWeightTiles = 16;  // tiles that take as long as the transform of the weight
// Of the definition's products: with large tiles, without them, and those of heavy weights.
constexpr double kMostProducts = 0.65, kMostSmall = 0.55, kMostHeavy = 0.6;

// Products for each pair of channels, those of the weight's transform included.
int64_t products(const Tiles& tiles) { return (tiles.size + 2) * (tiles.size + 2) * (tiles.count + kWeightTiles); }

// Tiles in a chunk with so many values to each.
int64_t chunk_tiles(int64_t tiles, int64_t values) {
  const int64_t most = std::clamp(kChunkElements / values, 2 * kTileStep, kMostTiles);
  return pieces(pieces(tiles, pieces(tiles, most)), kTileStep) * kTileStep;
}

// f(first, number) for steps of tiles
template <class F>
void for_each_step(int64_t tiles, int64_t step, F f) {
  at::parallel_for(0, pieces(tiles, step), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i * step, std::min(step, tiles - i * step));
  });
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
  const Taps taps(weight, adjoint);
  const float* const w_data = taps.values.const_data_ptr<float>();
  const Matrices u{planes, from};
  const Tensor transformed = at::empty({u.size(to)}, at::kFloat);
  float* const U = transformed.mutable_data_ptr<float>();
  at::parallel_for(0, blocks * pieces(from, kRows), 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const Block b(unit % blocks, to);
      const int64_t r = unit / blocks * kRows;
      transforms.weight(w_data + r * taps.row + b.first, taps.tap, taps.row, adjoint, std::min(kRows, from - r),
                        b.width, U + u.offset(b) + r * b.width, u.plane(b));
    }
  });

  Tensor out = at::empty(sizes, data.options().memory_format(at::MemoryFormat::ChannelsLast));
  const float* const in_data = data.const_data_ptr<float>();
  float* const out_data = out.mutable_data_ptr<float>();
  const std::vector<float> zeros(from, 0);
  const int64_t v_row = from + kGap;
  // The steps, for tiles first … first + number − 1, whose rows in V and M are meant.
  const auto transform = [&](int64_t first, int64_t number, float* V, int64_t v_plane) {
    std::vector<const float*> pixels(number * planes);
    tiles.locate(tiles.size + 2, in_data, data.sizes(), top, left, first, number, zeros.data(), pixels.data());
    transforms.input(pixels.data(), 0, number, from, V, v_plane, v_row);
  };
  const auto multiply = [&](int64_t p, const Block& b, int64_t number, const float* V_p, float* M_p) {
    for (int64_t k = 0; k < from; k += kInner)
      loops().multiply(V_p + k, v_row, 1, U + u.offset(b) + p * u.plane(b) + k * b.width, b.width, M_p, b.width, number,
                       b.width, std::min(kInner, from - k), k > 0);
  };
  const auto locate_results = [&](int64_t first, int64_t number) {
    std::vector<float*> results(number * tiles.size * tiles.size);
    tiles.locate<float>(tiles.size, out_data, sizes, 0, 0, first, number, nullptr, results.data());
    return results;
  };

  if (from * to >= kHeavyWeight) {
    const int64_t most = std::min(tiles.count, kTogether), band = chunk_tiles(most, planes * from);
    const int64_t v_plane = most * v_row + kGap;
    const Matrices m{planes, most};
    const Tensor v_room = at::empty({planes * v_plane}, at::kFloat), m_room = at::empty({m.size(to)}, at::kFloat);
    float *const V = v_room.mutable_data_ptr<float>(), *const M = m_room.mutable_data_ptr<float>();
    for (int64_t start = 0; start < tiles.count; start += most) {
      const int64_t count = std::min(most, tiles.count - start), bands = pieces(count, band);
      for_each_step(count, kStep, [&](int64_t first, int64_t number) {
        transform(start + first, number, V + first * v_row, v_plane);
      });
      at::parallel_for(0, planes * bands, 1, [&](int64_t begin, int64_t end) {
        for (int64_t unit = begin; unit < end; ++unit) {
          const int64_t p = unit / bands, first = unit % bands * band;
          for (int64_t i = 0; i < blocks; ++i) {
            const Block b(i, to);
            multiply(p, b, std::min(band, count - first), V + p * v_plane + first * v_row,
                     M + m.offset(b) + p * m.plane(b) + first * b.width);
          }
        }
      });
      for_each_step(count, kStep, [&](int64_t first, int64_t number) {
        const auto results = locate_results(start + first, number);
        for (int64_t i = 0; i < blocks; ++i) {
          const Block b(i, to);
          transforms.output(M + m.offset(b) + first * b.width, m.plane(b), b.width, number, b.width, results.data(),
                            b.first);
        }
      });
    }
    return out;
  }

  const int64_t chunk = chunk_tiles(tiles.count, planes * from), chunks = pieces(tiles.count, chunk);
  const int64_t group = pieces(blocks, std::min(blocks, pieces(kUnits, chunks))), groups = pieces(blocks, group);
  const int64_t v_plane = chunk * v_row + kGap;
  const Matrices m{planes, chunk};
  at::parallel_for(0, chunks * groups, 1, [&](int64_t begin, int64_t end) {
    thread_local AlignedVector<float> V, M;
    V.resize(planes * v_plane), M.resize(m.size(kBlock));
    std::vector<float*> results;
    for (int64_t unit = begin, held = -1; unit < end; ++unit) {
      const int64_t first = unit / groups * chunk, number = std::min(chunk, tiles.count - first);
      if (held != first) {  // units of the same chunk follow each other
        transform(first, number, V.data(), v_plane);
        results = locate_results(first, number);
        held = first;
      }
      const int64_t first_block = unit % groups * group;
      for (int64_t i = first_block; i < std::min(blocks, first_block + group); ++i) {
        const Block b(i, to);
        for (int64_t p = 0; p < planes; ++p) multiply(p, b, number, V.data() + p * v_plane, M.data() + p * m.plane(b));
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
  const double most = large                                               ? kMostProducts
                      : weight_sizes[0] * weight_sizes[1] >= kHeavyWeight ? kMostHeavy
                                                                          : kMostSmall;
  return std::min(weight_sizes[0], weight_sizes[1]) >= kLeastChannels &&
         products(Tiles(sizes, 2)) <= most * 9 * sizes[0] * sizes[2] * sizes[3];
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
                            const ConvGeometry& g, at::MemoryFormat format) {
  const Tiles tiles(grad_output.sizes(), 2);
  const auto& transforms = loops().small;
  const int64_t planes = transforms.planes();
  const int64_t from = weight_sizes[1], to = weight_sizes[0], blocks = pieces(to, kBlock);
  const Matrices u{planes, from};
  const int64_t part = u.size(to);
  const float *const x_data = input.const_data_ptr<float>(), *const dy_data = grad_output.const_data_ptr<float>();
  const std::vector<float> zeros(std::max(from, to), 0);
  const auto locate_x = [&](int64_t first, int64_t number) {
    std::vector<const float*> pixels(number * 16);
    tiles.locate(4, x_data, input.sizes(), g.padding[0], g.padding[2], first, number, zeros.data(), pixels.data());
    return pixels;
  };
  const auto locate_dy = [&](int64_t first, int64_t number) {
    std::vector<const float*> pixels(number * 4);
    tiles.locate(2, dy_data, grad_output.sizes(), 0, 0, first, number, zeros.data(), pixels.data());
    return pixels;
  };

  int64_t slices = 1;
  Tensor parts;
  if (from * to >= kHeavyWeight) {
    const int64_t most = std::min(tiles.count, kTogether), from_blocks = pieces(from, kBlock);
    const Matrices v{planes, most}, d{planes, most};
    const Tensor v_room = at::empty({v.size(from)}, at::kFloat), d_room = at::empty({d.size(to)}, at::kFloat);
    parts = at::empty({part}, at::kFloat);
    float *const V = v_room.mutable_data_ptr<float>(), *const D = d_room.mutable_data_ptr<float>();
    float* const sums = parts.mutable_data_ptr<float>();
    for (int64_t start = 0; start < tiles.count; start += most) {
      const int64_t count = std::min(most, tiles.count - start);
      for_each_step(count, kStep, [&](int64_t first, int64_t number) {
        const auto x_pixels = locate_x(start + first, number), dy_pixels = locate_dy(start + first, number);
        for (int64_t i = 0; i < from_blocks; ++i) {
          const Block b(i, from);
          transforms.input(x_pixels.data(), b.first, number, b.width, V + v.offset(b) + first * b.width, v.plane(b),
                           b.width);
        }
        for (int64_t i = 0; i < blocks; ++i) {
          const Block b(i, to);
          loops().grad_output(dy_pixels.data(), b.first, number, b.width, D + d.offset(b) + first * b.width, d.plane(b),
                              b.width);
        }
      });
      at::parallel_for(0, planes * blocks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t unit = begin; unit < end; ++unit) {
          const int64_t p = unit / blocks;
          const Block b(unit % blocks, to);
          for (int64_t t = 0; t < count; t += kInner)
            for (int64_t i = 0; i < from_blocks; ++i) {
              const Block rows(i, from);
              loops().multiply(V + v.offset(rows) + p * v.plane(rows) + t * rows.width, 1, rows.width,
                               D + d.offset(b) + p * d.plane(b) + t * b.width, b.width,
                               sums + u.offset(b) + p * u.plane(b) + rows.first * b.width, b.width, rows.width, b.width,
                               std::min(kInner, count - t), start + t > 0);
            }
        }
      });
    }
  } else {
    const int64_t chunk = chunk_tiles(tiles.count, planes * (from + kBlock)), chunks = pieces(tiles.count, chunk);
    const int64_t most = std::min({kUnits, chunks, std::max<int64_t>(1, kMostParts / part)});
    const int64_t length = pieces(chunks, most);  // in chunks
    slices = pieces(chunks, length);
    const int64_t group = pieces(blocks, std::min(blocks, pieces(kUnits / 2, slices))), groups = pieces(blocks, group);
    const int64_t v_row = from + kGap, v_plane = chunk * v_row + kGap;
    const Matrices d{planes, chunk};
    parts = at::empty({slices * part}, at::kFloat);
    float* const sums = parts.mutable_data_ptr<float>();
    at::parallel_for(0, slices * groups, 1, [&](int64_t begin, int64_t end) {
      thread_local AlignedVector<float> V, D;
      V.resize(planes * v_plane), D.resize(d.size(kBlock));
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t slice = unit / groups, first_block = unit % groups * group;
        for (int64_t c = slice * length; c < std::min(chunks, (slice + 1) * length); ++c) {
          const int64_t first = c * chunk, number = std::min(chunk, tiles.count - first);
          const auto x_pixels = locate_x(first, number), dy_pixels = locate_dy(first, number);
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
  }

  // As a matrix with `to` columns, whose transpose is dw in its memory format.
  const bool pixels = format == at::MemoryFormat::ChannelsLast;
  const Tensor taps =
      at::empty({1, to, 9, from}, at::TensorOptions(at::kFloat).memory_format(at::MemoryFormat::ChannelsLast));
  float* const dw = taps.mutable_data_ptr<float>();
  const float* const sums = parts.const_data_ptr<float>();
  const int64_t tap = pixels ? from * to : to, row = pixels ? to : 9 * to;
  at::parallel_for(0, blocks * pieces(from, kRows), 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const Block b(unit % blocks, to);
      const int64_t r = unit / blocks * kRows;
      loops().grad_weight(sums + u.offset(b) + r * b.width, u.plane(b), slices, part, std::min(kRows, from - r),
                          b.width, dw + r * row + b.first, tap, row);
    }
  });
  const Tensor turned = to_format(taps, at::MemoryFormat::Contiguous);
  return pixels ? turned.view({to, 3, 3, from}).permute({0, 3, 1, 2}) : turned.view({to, from, 3, 3});
}

}  // namespace convbn
