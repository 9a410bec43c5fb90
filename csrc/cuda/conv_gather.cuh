// A matrix whose rows are the pixels of one grid and whose columns are (tap, channel), gathered from an image:
//   element (p, q) with q = tap·C_g + c is the image's channel c at the pixel that p sees through the tap, or 0.
// One description serves all operands of the three products:
//   im2col(x) of forward and grad_weight   pixels of y, taps of the kernel into x
//   dy in grad_input                       pixels of x, the adjoint taps into y
//   dy in grad_weight, and weights         every pixel sees itself, one tap
#pragma once
#include "conv.h"
#include "pack.cuh"

namespace convbn {

// One axis of the map from (pixel i, tap) to a coordinate of the image: (i·scale + shift + tap·step)/divisor where that
// is whole; outside [0, size) the border decides. −1: no pixel.
struct Axis {
  int scale = 1, shift = 0, step = 0, divisor = 1, size = 1;
  PaddingMode border = PaddingMode::zeros;

  __device__ __forceinline__ int at(int i, int tap) const {
    int v = i * scale + shift + tap * step;
    if (divisor > 1) {
      if (v % divisor) return -1;
      v /= divisor;
    }
    return source_position(v, size, border);
  }
};

struct Gather {
  int64_t pixels = 0, sample_stride = 0;  // rows of the matrix; scalars of one sample of the image
  int height = 1, width = 1;              // of the pixels' grid
  Axis axis[2];
  int kernel[2] = {1, 1};
  int channels = 0, per_group = 0;              // of the image
  int step_sample = 0, step_h = 0, step_w = 0;  // pixels that a product over pixels advances by

  int columns() const { return kernel[0] * kernel[1] * per_group; }
  Gather& advancing_by(int step) {
    step_w = step % width;
    step_h = step / width % height;
    step_sample = step / width / height;
    return *this;
  }
};

// The pixel p: where its sample begins in the image, its place in the grid, and how many pixels are left from it on.
struct Pixel {
  int64_t sample = 0, left = 0;
  int h = 0, w = 0;

  Pixel() = default;
  __device__ __forceinline__ Pixel(const Gather& g, int64_t p, int64_t end) : left(end - p) {
    const int64_t row = p / g.width;
    w = static_cast<int>(p - row * g.width);
    h = static_cast<int>(row % g.height);
    sample = row / g.height * g.sample_stride;
  }
  __device__ __forceinline__ void advance(const Gather& g, int step) {
    left -= step;
    w += g.step_w;
    h += g.step_h;
    sample += g.step_sample * g.sample_stride;
    if (w >= g.width) {
      w -= g.width;
      ++h;
    }
    if (h >= g.height) {
      h -= g.height;
      sample += g.sample_stride;
    }
  }
};

// The column q: tap (r, s) and channel within the group. Behind the last column r reaches the kernel's height.
struct Column {
  int r = 0, s = 0, c = 0;

  Column() = default;
  __device__ __forceinline__ Column(const Gather& g, int q) {
    const int tap = q / g.per_group;
    c = q - tap * g.per_group;
    r = tap / g.kernel[1];
    s = tap - r * g.kernel[1];
  }
  __device__ __forceinline__ void advance(const Gather& g, int step) {
    c += step;
    while (c >= g.per_group) {
      c -= g.per_group;
      if (++s == g.kernel[1]) {
        s = 0;
        ++r;
      }
    }
  }
};

// Where element (p, q) lies in the image, without the group's first channel; −1 where it is 0.
__device__ __forceinline__ int64_t locate(const Gather& g, const Pixel& p, const Column& q) {
  if (p.left <= 0 || q.r >= g.kernel[0]) return -1;
  const int h = g.axis[0].at(p.h, q.r), w = g.axis[1].at(p.w, q.s);
  if (h < 0 || w < 0) return -1;
  return p.sample + (int64_t{h} * g.axis[1].size + w) * g.channels + q.c;
}

inline Gather gather_input(const ConvProblem& p) {
  Gather g;
  g.pixels = p.samples * p.out_size[0] * p.out_size[1];
  g.sample_stride = int64_t{p.size[0]} * p.size[1] * p.channels;
  g.height = p.out_size[0];
  g.width = p.out_size[1];
  g.channels = p.channels;
  g.per_group = p.channels / p.groups;
  for (int i = 0; i < 2; ++i) {
    g.kernel[i] = p.kernel[i];
    g.axis[i] = {p.stride[i], -p.padding[i], p.dilation[i], 1, p.size[i], p.border};
  }
  return g;
}

inline Gather gather_adjoint(const ConvProblem& p) {
  Gather g;
  g.pixels = p.samples * p.size[0] * p.size[1];
  g.sample_stride = int64_t{p.out_size[0]} * p.out_size[1] * p.out_channels;
  g.height = p.size[0];
  g.width = p.size[1];
  g.channels = p.out_channels;
  g.per_group = p.out_channels / p.groups;
  for (int i = 0; i < 2; ++i) {
    g.kernel[i] = p.kernel[i];
    g.axis[i] = {1, p.padding[i], -p.dilation[i], p.stride[i], p.out_size[i], PaddingMode::zeros};
  }
  return g;
}

// (rows, channels), whose columns are per_group channels of a group.
inline Gather gather_itself(int64_t rows, int channels, int per_group) {
  Gather g;
  g.pixels = rows;
  g.sample_stride = channels;  // each row a sample of one pixel: rows may exceed an int
  g.channels = channels;
  g.per_group = per_group;
  return g;
}

}  // namespace convbn
