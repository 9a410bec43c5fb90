// Padding modes, and where a padded position is read; for host and device. No torch headers.
#pragma once

#include "host_device.h"

namespace convbn {

enum class PaddingMode { zeros, circular, reflect, replicate };

// Element of an axis of n that is read at position p (p < 0 and p ≥ n lie in the padding); −1 where a zero is read.
CONVBN_HOST_DEVICE inline int source_position(int p, int n, PaddingMode mode) {
  if (p >= 0 && p < n) return p;
  switch (mode) {
    case PaddingMode::circular:
      return p < 0 ? p + n : p - n;
    case PaddingMode::reflect:
      return p < 0 ? -p : 2 * (n - 1) - p;
    case PaddingMode::replicate:
      return p < 0 ? 0 : n - 1;
    default:
      return -1;
  }
}

}  // namespace convbn
