// What Winograd's convolution works on: tiles of images, matrices over blocks of output channels, taps of a weight.
#pragma once
#include <ATen/ATen.h>

#include <algorithm>

#include "bn_blocks.h"
#include "memory_format.h"

namespace convbn::winograd {

constexpr int64_t kBlock = 64;  // output channels
constexpr int64_t kGap = 16;    // behind rows and planes: at powers of two they would push each other out of the caches

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
  Tiles(at::IntArrayRef result, int64_t size)
      : size(size),
        rows(pieces(result[2], size)),
        columns(pieces(result[3], size)),
        count(result[0] * rows * columns) {}

  // Where `reach` × `reach` pixels of each tile are in data (N, channels, H, W), from `top` rows above and `left`
  // columns left of the tile on; `empty` for those outside.
  template <class T>
  void locate(int64_t reach, T* data, at::IntArrayRef sizes, int64_t top, int64_t left, int64_t first, int64_t number,
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

// The taps (9, C, O) of a weight (O, C, 3, 3), or (9, O, C) for the adjoint; the last axis' values lie side by side.
struct Taps {
  at::Tensor values;
  int64_t tap, row;  // strides
  Taps(const at::Tensor& weight, bool adjoint) {
    const int64_t out = weight.size(0), in = weight.size(1);
    const auto last = at::MemoryFormat::ChannelsLast;
    const at::Tensor w = weight.is_contiguous() ? weight : weight.contiguous(last);
    if (adjoint) {
      values = to_format(w, last), tap = in, row = 9 * in;
      return;
    }
    const bool pixels = w.is_contiguous(last);
    values = to_format((pixels ? w.permute({0, 2, 3, 1}) : w).view({1, out, 9, in}), last);
    tap = pixels ? in * out : out, row = pixels ? out : 9 * out;
  }
};

}  // namespace convbn::winograd
