// The axes of a convolution, y[i] = Σ_t w[t] x[i·s + t·d − p] along each.
#pragma once
#include <array>

#include "../convolution.h"

namespace convbn {

struct Axis {
  int64_t x = 1, y = 1, kernel = 1, stride = 1, padding = 0, dilation = 1;
  // The index of x, which may be none, that index i of y meets with tap t.
  int64_t met(int64_t i, int64_t t) const { return i * stride - padding + t * dilation; }
};

using Axes = std::array<Axis, 3>;  // (depth, height, width); the first are 1 where there are fewer

inline Axes axes_of(at::IntArrayRef x, at::IntArrayRef y, at::IntArrayRef weight, const ConvGeometry& g) {
  Axes axes;
  for (int64_t i = 0, axis = 3 - g.axes(); axis < 3; ++i, ++axis)
    axes[axis] = {x[i + 2], y[i + 2], weight[i + 2], g.stride[i], g.padding[2 * i], g.dilation[i]};
  return axes;
}

// A layer with one axis has rows alone.
inline ConvGeometry of_rows(const ConvGeometry& g) {
  return {{1, g.stride[0]}, {0, 0, g.padding[0], g.padding[1]}, {1, g.dilation[0]}, g.groups};
}

}  // namespace convbn
