// (count, mean, M₂ = Σ(y − mean)²) of a set of values, and of the union of two (Chan's rule).
#pragma once
#include "device.cuh"

namespace convbn {

struct Moments {
  static constexpr int kFields = 3;
  double count = 0, mean = 0, m2 = 0;

  __device__ __forceinline__ void merge(const Moments& other) {
    if (other.count == 0) return;
    const double total = count + other.count, delta = other.mean - mean, part = other.count / total;
    mean += delta * part;
    m2 += other.m2 + delta * delta * count * part;
    count = total;
  }
  __device__ __forceinline__ double& field(int i) { return i == 0 ? count : i == 1 ? mean : m2; }
};

}  // namespace convbn
