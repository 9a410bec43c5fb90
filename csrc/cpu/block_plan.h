// What a block-tridiagonal factorisation knows before it sees weights: the order of the unknowns and where each product
// of the convolution stands. See block_lu_cpu.cpp.
#pragma once
#include <ATen/ATen.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <vector>

namespace convbn {

using at::Tensor;

// Rows of W or of Wᵀ in the order of the groups; the entries of a row stand in the order of their columns' groups, so
// that the lower, the diagonal and the upper part are one piece each.
struct Rows {
  enum Part { lower, diagonal, upper, parts };
  std::vector<int64_t> start;  // (n, parts) and the end
  std::vector<int> column;     // position of the column
  std::vector<int> tap;        // index into the weight

  int64_t begin(int64_t row, int part) const { return start[row * parts + part]; }
  int64_t end(int64_t row, int part) const { return start[row * parts + part + 1]; }
};

// What geometry and sizes alone determine: positions p = 0 … n−1 in the order (group, row in group, everything else),
// and where each product of the convolution stands.
struct BlockPlan {
  // row, column, tap (nnz,) int64: every product of the convolution; unknowns (outer, size, inner) cut along `size`
  BlockPlan(const Tensor& row, const Tensor& column, const Tensor& tap, int64_t outer, int64_t size, int64_t inner,
            int64_t rows)
      : n(outer * size * inner), group_rows(rows * outer * inner), groups((size + rows - 1) / rows), order(n) {
    TORCH_CHECK_VALUE(rows >= 1 && rows <= size, "BlockPlan: rows must be from 1 to ", size, ", got ", rows);
    std::vector<int> position(n);
    int64_t p = 0;
    for (int64_t s = 0; s < size; ++s)
      for (int64_t o = 0; o < outer; ++o)
        for (int64_t i = 0; i < inner; ++i, ++p) {
          order[p] = int((o * size + s) * inner + i);
          position[order[p]] = int(p);
        }
    const Tensor r = row.contiguous(), c = column.contiguous(), t = tap.contiguous();
    const auto *rp = r.const_data_ptr<int64_t>(), *cp = c.const_data_ptr<int64_t>(), *tp = t.const_data_ptr<int64_t>();
    std::vector<int> from(r.numel()), to(r.numel()), which(tp, tp + r.numel());
    for (int64_t e = 0; e < r.numel(); ++e) {
      from[e] = position[rp[e]], to[e] = position[cp[e]];
      TORCH_CHECK_VALUE(std::abs(group(from[e]) - group(to[e])) <= 1, "BlockPlan: rows ", rows,
                        " are fewer than the kernel reaches");
    }
    matrix = sorted(from, to, which);
    adjoint = sorted(to, from, which);
  }

  int64_t group(int64_t p) const { return p / group_rows; }
  int64_t begin(int64_t r) const { return r * group_rows; }
  int64_t size(int64_t r) const { return std::min(group_rows, n - begin(r)); }
  int64_t middle() const { return groups / 2; }

  Rows sorted(const std::vector<int>& row, const std::vector<int>& column, const std::vector<int>& tap) const {
    Rows result{std::vector<int64_t>(n * Rows::parts + 1), std::vector<int>(tap.size()), std::vector<int>(tap.size())};
    const auto key = [&](size_t e) { return row[e] * Rows::parts + (group(column[e]) - group(row[e]) + 1); };
    for (size_t e = 0; e < tap.size(); ++e) ++result.start[key(e) + 1];
    for (size_t i = 1; i < result.start.size(); ++i) result.start[i] += result.start[i - 1];
    std::vector<int64_t> next(result.start.begin(), result.start.end() - 1);
    for (size_t e = 0; e < tap.size(); ++e) {
      const int64_t at = next[key(e)]++;
      result.column[at] = column[e], result.tap[at] = tap[e];
    }
    return result;
  }

  int64_t n, group_rows, groups;
  std::vector<int> order;  // position → index of the unknown
  Rows matrix, adjoint;
};

// Γ, 1/Γ and b̂ of each position, from one per channel.
struct PositionScales {
  PositionScales(const BlockPlan& plan, const Tensor& per_channel, const Tensor& shift)
      : scale(plan.n), divisor(plan.n), offset(plan.n) {
    const int64_t size = plan.n / per_channel.numel();
    const auto s = per_channel.accessor<double, 1>(), o = shift.accessor<double, 1>();
    for (int64_t p = 0; p < plan.n; ++p) {
      const int64_t c = plan.order[p] / size;
      scale[p] = s[c], divisor[p] = 1 / s[c], offset[p] = o[c];
    }
  }
  std::vector<double> scale, divisor, offset;
};

}  // namespace convbn
