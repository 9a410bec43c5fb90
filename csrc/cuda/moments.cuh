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

// The same about a common pivot p: n, Σ(y − p), Σ(y − p)² are plain sums, so many sets are united without a division.
// In float64 a pivot among the values costs no digits that matter, also with mean ≫ std.
struct MomentSums {
  static constexpr int kFields = 3;
  double count = 0, first = 0, second = 0;

  MomentSums() = default;
  __device__ __forceinline__ MomentSums(const Moments& m, double pivot) {
    const double d = m.mean - pivot;
    count = m.count, first = m.count * d, second = m.m2 + m.count * d * d;
  }
  __device__ __forceinline__ Moments about(double pivot) const {
    if (count == 0) return {};
    const double d = first / count;
    return {count, pivot + d, second - first * d};
  }
  __device__ __forceinline__ void add(const MomentSums& other) {
    count += other.count, first += other.first, second += other.second;
  }
  __device__ __forceinline__ double& field(int i) { return i == 0 ? count : i == 1 ? first : second; }
};

}  // namespace convbn
