// A block has the same bits wherever it is computed, for one thread computes it.
#include "block_product.h"

#include <algorithm>

#include "bn_blocks.h"
#include "one_thread.h"

namespace convbn {

using at::Tensor;

namespace {

constexpr int64_t kUnits = 16;               // of work, if the products are large enough
constexpr int64_t kEdge = 64;                // of a block, at least
constexpr int64_t kBlockSize = 1 << 19;      // multiply-adds in a block, at least
constexpr int64_t kHalfBlockSize = 1 << 24;  // of 16-bit types, by estimate: with AMX a call costs some millions

}  // namespace

Tensor block_product(const Tensor& a, const Tensor& b) {
  if (!a.is_cpu() || a.numel() == 0 || b.numel() == 0) return at::matmul(a, b);
  if (a.dim() == 2) return block_product(a.unsqueeze(0), b.unsqueeze(0)).squeeze(0);
  const int64_t S = a.size(0), M = a.size(1), K = a.size(2), N = b.size(2);
  const int64_t least = at::isReducedFloatingType(a.scalar_type()) ? kHalfBlockSize : kBlockSize;
  int64_t height = M, width = N;
  const auto units_of = [&] { return S * pieces(M, height) * pieces(N, width); };
  while (units_of() < kUnits && std::max(height, width) >= 2 * kEdge && height * width * K >= 2 * least) {
    int64_t& edge = height > width ? height : width;
    edge = pieces(edge, 2 * kEdge) * kEdge;
  }
  const int64_t units = units_of(), columns = pieces(N, width);
  const Tensor out = at::empty({S, M, N}, a.options());
  each_by_one_thread(units, [&](int64_t unit) {
    const int64_t i = unit / columns, s = i / pieces(M, height), m = i % pieces(M, height) * height;
    const int64_t n = unit % columns * width, rows = std::min(height, M - m), wide = std::min(width, N - n);
    Tensor block = out[s].narrow(0, m, rows).narrow(1, n, wide);
    at::mm_out(block, a[s].narrow(0, m, rows), b[s].narrow(1, n, wide));
  });
  return out;
}

}  // namespace convbn
