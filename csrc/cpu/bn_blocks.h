// How batch normalisation walks over a tensor: blocks that fit the cache, their columns, and per-channel values for
// them.
#pragma once
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <new>
#include <numeric>
#include <vector>

#include "../conv_bn.h"
#include "bn_loops.h"

namespace convbn {

constexpr int64_t kBlockElements = 32768;
constexpr int64_t kMinBlockRows = 64;         // rows of C channels that share one partial result
constexpr int64_t kSideBySideColumns = 1024;  // at most: their parameters stay in the L1 cache
constexpr int64_t kLanesMost = 16;

inline int64_t pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }

// How y's memory is cut up: N samples of P planes of S consecutive elements, an element's parameters repeating with
// `width`. A contiguous y has a plane per channel; a channels_last y is one plane of rows that hold all channels. Small
// planes lie side by side: a block's row is one sample of several planes, whose elements are columns of their own.
// A block is some samples × some planes × some elements, small enough for the cache and cut by y's shape alone.
class Blocks {
 public:
  struct Block {
    int64_t sample, samples, plane, planes, element, elements;
  };

  // With image rows of `row` elements a channels_last y is cut between them.
  explicit Blocks(const at::Tensor& y, int64_t row = 0) {
    channels = y.size(1);
    N_ = y.size(0), P_ = channels, S_ = y.numel() / std::max<int64_t>(1, N_ * P_);
    if (S_ == 1 || P_ == 1 || !y.is_contiguous()) {  // channels_last, also where both layouts are the same
      N_ = P_ = 1, S_ = y.numel();
      per_plane = width = channels;
      if (channels < 256) width *= 16 / std::gcd<int64_t>(channels, 16);  // odd C: rows side by side fill the vectors
      while (width < 64) width *= 2;
      if (row == 0) row = width;
      elements_ = std::max(row, std::max(kBlockElements, kMinBlockRows * channels) / row * row);
    } else {
      elements_ = kBlockElements;
      planes_ = kLanesMost / std::gcd(S_, kLanesMost);  // whole vectors
      side_by_side_ = planes_ * S_ <= kSideBySideColumns;
    }
    elements_ = std::max<int64_t>(1, std::min(elements_, S_));
    parameters = width;
    if (side_by_side_) {
      parameters = width = S_;
      while (2 * planes_ * S_ <= kSideBySideColumns) planes_ *= 2;
      planes_ = std::min(planes_, P_);
      samples_ = std::clamp<int64_t>(kBlockElements / (planes_ * S_), 1, std::max<int64_t>(1, N_));
    } else {
      if (P_ > 1) parameters = 1;
      planes_ = std::clamp<int64_t>(kBlockElements / elements_, 1, P_);
      samples_ = planes_ < P_ ? 1 : std::clamp<int64_t>(kBlockElements / (elements_ * P_), 1, std::max<int64_t>(1, N_));
    }
    count = pieces(N_, samples_) * pieces(P_, planes_) * pieces(S_, elements_);
  }

  int64_t channels, count;
  int64_t width = kPlaneWidth;  // columns of sums that a plane has
  int64_t parameters;           // columns of parameters
  int64_t per_plane = 1;        // channels among them

  Block operator[](int64_t i) const {
    const int64_t along = pieces(S_, elements_), across = pieces(P_, planes_);
    Block b;
    b.element = i % along * elements_;
    b.plane = i / along % across * planes_;
    b.sample = i / along / across * samples_;
    b.elements = std::min(elements_, S_ - b.element);
    b.planes = std::min(planes_, P_ - b.plane);
    b.samples = std::min(samples_, N_ - b.sample);
    return b;
  }
  // f(first element, span, first plane) for every stretch of consecutive elements, in memory order
  template <class F>
  void for_each_span(const Block& b, F f) const {
    if (side_by_side_) {
      const int64_t row = b.planes * S_;
      f((b.sample * P_ + b.plane) * S_, Span{b.samples * row, row, 1, P_ * S_}, b.plane);
      return;
    }
    // more than one plane in a block means whole planes, which follow each other
    for (int64_t n = b.sample; n < b.sample + b.samples; ++n)
      f((n * P_ + b.plane) * S_ + b.element, Span{b.elements, parameters, b.planes, parameters}, b.plane);
  }
  // f(block) for all blocks, on all threads
  template <class F>
  void parallel_for_each(F f) const {
    at::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) f((*this)[i], i);
    });
  }
  int64_t values(const Block& b) const { return b.samples * b.elements / per_plane; }  // per channel
  int64_t most_channels() const { return planes_ * per_plane; }                        // in one block
  int64_t most_parameters() const { return planes_ * parameters; }

 private:
  int64_t N_, P_, S_, samples_, planes_, elements_;
  bool side_by_side_ = false;
};

// No vector of the loops crosses a cache line.
template <class T>
struct CacheAligned {
  using value_type = T;
  static constexpr std::align_val_t kLine{64};
  CacheAligned() = default;
  template <class U>
  CacheAligned(const CacheAligned<U>&) {}
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), kLine)); }
  void deallocate(T* p, size_t) { ::operator delete(p, kLine); }
  bool operator==(const CacheAligned&) const { return true; }
};
template <class T>
using AlignedVector = std::vector<T, CacheAligned<T>>;

// Room for so many values, whose former content is lost.
template <class T>
T* at_least(AlignedVector<T>& room, int64_t size) {
  if (static_cast<int64_t>(room.size()) < size) room = AlignedVector<T>(size);
  return room.data();
}

// Per-channel float64 vectors as the loops want them: one value per column.
template <typename acc>
class Columns {
 public:
  Columns(const Blocks& blocks, const std::vector<double>& channel)
      : width_(blocks.parameters), values_(blocks.channels / blocks.per_plane * blocks.parameters) {
    for (size_t i = 0, plane = 0; i < values_.size(); ++plane)
      if (blocks.per_plane == 1) {
        const auto value = static_cast<acc>(channel[plane]);
        for (int64_t k = 0; k < width_; ++k) values_[i++] = value;
      } else {
        for (int64_t c = 0; c < blocks.channels; ++c) values_[i++] = static_cast<acc>(channel[c]);
      }
  }
  const acc* of(int64_t plane) const { return values_.data() + plane * width_; }

 private:
  int64_t width_;
  AlignedVector<acc> values_;
};

// The mean rounded to the arithmetic of the loops, and what the rounding left: y − μ = (y − rounded) + rest.
// With mean ≫ std the rest matters, and it is free: it goes into the additive parameter of each formula.
template <typename acc>
struct SplitMean {
  std::vector<double> rounded, rest;
  explicit SplitMean(const at::Tensor& mean) : rounded(to_vector(mean)), rest(rounded.size()) {
    for (size_t c = 0; c < rounded.size(); ++c) {
      const double exact = rounded[c];
      rounded[c] = static_cast<double>(static_cast<acc>(exact));
      rest[c] = rounded[c] - exact;
    }
  }
};

inline std::vector<double> plus_product(std::vector<double> sum, const std::vector<double>& a,
                                        const std::vector<double>& b) {
  for (size_t c = 0; c < sum.size(); ++c) sum[c] += a[c] * b[c];
  return sum;
}

// Adds the columns of a block's planes up to its channels; a plane of fewer elements than columns leaves the rest
// unused.
template <typename acc>
void fold_columns(const Blocks& blocks, const Blocks::Block& b, const acc* columns, double* sums) {
  std::fill(sums, sums + b.planes * blocks.per_plane, 0.0);
  const int64_t used = std::min(b.elements, blocks.width);
  for (int64_t p = 0; p < b.planes; ++p) {
    const acc* column = columns + p * blocks.width;
    if (blocks.per_plane == 1) {  // four chains of additions instead of one
      double chain[4] = {};
      for (int64_t i = 0; i < used; ++i) chain[i % 4] += column[i];
      sums[p] = (chain[0] + chain[1]) + (chain[2] + chain[3]);
    } else {
      for (int64_t i = 0; i < used; i += blocks.per_plane)
        for (int64_t c = 0; c < blocks.per_plane; ++c) sums[p * blocks.per_plane + c] += column[i + c];
    }
  }
}

}  // namespace convbn
