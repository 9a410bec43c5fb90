// Storage of a Krylov basis: vectors v₀, v₁, … for S systems, in blocks that double, so that a large restart costs
// nothing when few steps suffice and no vector is ever moved.
#pragma once
#include <ATen/ATen.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace convbn {

class Basis {
 public:
  // At most `capacity` vectors of n entries for each of S systems.
  Basis(int64_t capacity, int64_t S, int64_t n, at::TensorOptions options)
      : capacity_(capacity), S_(S), n_(n), options_(options) {}

  // Room for `count` vectors.
  void reserve(int64_t count) {
    while (size_ < count) {
      const int64_t more = std::min(std::max(kFirstBlock, size_), capacity_ - size_);
      // A row starts an odd number of cache lines after the one before it, so that a chunk of all rows spreads over the
      // cache.
      const int64_t line = kCacheLine / options_.dtype().itemsize(), stride = ((S_ * n_ + line - 1) / line | 1) * line;
      blocks_.push_back(at::empty({more * stride}, options_).as_strided({more, S_, n_}, {stride, n_, 1}));
      size_ += more;
    }
  }

  // v_j of the systems in `rows` (a copy) or, if these are the first `S` systems in order, a view (S, n).
  at::Tensor vectors(int64_t j, const at::Tensor& rows, int64_t S) const {
    for (const at::Tensor& block : blocks_) {
      if (j < block.size(0)) {
        const at::Tensor v = block.select(0, j);
        return rows.numel() == S ? v.narrow(0, 0, S) : v.index_select(0, rows.to(v.device()));
      }
      j -= block.size(0);
    }
    TORCH_INTERNAL_ASSERT(false, "no such basis vector");
  }

  // v_j ← z for the systems in `rows`.
  void assign(int64_t j, const at::Tensor& rows, const at::Tensor& z) {
    reserve(j + 1);
    for (at::Tensor& block : blocks_) {
      if (j < block.size(0)) return void(block.select(0, j).index_copy_(0, rows.to(z.device()), z));
      j -= block.size(0);
    }
  }

  at::ScalarType dtype() const { return options_.dtype().toScalarType(); }
  at::TensorList blocks() const { return blocks_; }

 private:
  static constexpr int64_t kFirstBlock = 16, kCacheLine = 64;
  int64_t capacity_, S_, n_, size_ = 0;
  at::TensorOptions options_;
  std::vector<at::Tensor> blocks_;
};

}  // namespace convbn
