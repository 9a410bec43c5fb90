// From a problem's shape to a kernel's template arguments, pack size and grid.
#pragma once
#include <algorithm>

#include "bn_layout.cuh"

namespace convbn {

// f(std::integral_constant<int, V>) with V scalars per pack.
template <typename scalar_t, class F>
void with_pack(int V, F f) {
  if (V == kPack<scalar_t>) {
    f(std::integral_constant<int, kPack<scalar_t>>{});
  } else {
    f(std::integral_constant<int, 1>{});
  }
}

template <class F>
void with_layout(bool channels_last, F f) {
  channels_last ? f(std::true_type{}) : f(std::false_type{});
}

constexpr int64_t kMaxGridY = 65535;

// A thread takes several packs of one column, or contiguous of one row, and of several rows where these are short.
inline dim3 elementwise_grid(const Matrix& m, bool channels_last, int V) {
  const int64_t packs = std::max(kPacksPerThread, ceil_div(m.rows * m.packs(V), kThreads * kElementwiseBlocks));
  const int64_t across = ceil_div(m.packs(V), m.threads_x), x = channels_last ? across : ceil_div(across, packs);
  const int64_t y = ceil_div(m.rows, m.threads_y * ceil_div(packs, ceil_div(across, x)));
  return dim3(x, std::min(y, kMaxGridY));
}

// launch(channels_last, scalar_t, V, matrix, grid, block)
template <class Launch>
void elementwise(const BnProblem& p, std::initializer_list<const void*> more, Launch launch) {
  with_scalar(p.scalar, [&]<typename scalar_t>(scalar_t) {
    with_pack<scalar_t>(pack_size(p, kPack<scalar_t>, more), [&](auto V) {
      with_layout(p.channels_last, [&](auto channels_last) {
        const Matrix m = matrix_of(p, V);
        const dim3 grid = elementwise_grid(m, p.channels_last, V);
        launch(channels_last, scalar_t{}, V, m, grid, dim3(m.threads_x, m.threads_y));
      });
    });
  });
}

struct ReduceGrid {
  int columns, blocks, parts;  // columns of partial results, blocks that cover them, partial results per column

  ReduceGrid(const Matrix& m, bool channels_last, int V) {
    columns = channels_last ? m.width : m.channels;
    blocks = channels_last ? (m.packs(V) + m.threads_x - 1) / m.threads_x : m.channels;
    const int64_t rows = channels_last ? m.rows : m.rows / m.channels * m.packs(V);
    const int64_t rows_per_block = (channels_last ? m.threads_y : kThreads) * kPacksPerThread;
    parts = static_cast<int>(std::clamp<int64_t>(ceil_div(rows, rows_per_block), 1, ceil_div(kBlocks, blocks)));
  }
};

template <class Launch>
void reduction(const BnProblem& p, Launch launch) {
  with_scalar(p.scalar, [&]<typename scalar_t>(scalar_t) {
    with_pack<scalar_t>(pack_size(p, kPack<scalar_t>), [&](auto V) {
      with_layout(p.channels_last, [&](auto channels_last) {
        const Matrix m = matrix_of(p, V);
        const ReduceGrid grid(m, p.channels_last, V);
        const dim3 block = p.channels_last ? dim3(m.threads_x, m.threads_y) : dim3(kThreads);
        const int per_thread = p.channels_last ? V : 0;  // results in shared memory, of half of the threads
        launch(channels_last, scalar_t{}, V, m, grid, dim3(grid.blocks, grid.parts), block, per_thread);
      });
    });
  });
}

}  // namespace convbn
