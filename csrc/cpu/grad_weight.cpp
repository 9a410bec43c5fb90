// With zeros beside the rows of x, a row i of the kernel has
//   dw[i, (j, c), o] = Σ_r Σ_w x[r·s + i·d − p, w·s + j·d − p, c] dy[r, w, o],
// a sum of products of matrices that lie in rows of x and dy, of which those of one group are copied. If d = 1, (j, c)
// counts along a row of x, and one product has all taps of a row of the kernel. With three axes r and i have two
// indices each.
//
// A chunk is some rows of dy, or a piece of a row. Chunks are cut into slices by the shape alone, whose sums are added
// at the end, in order. Work is slices times blocks of output channels, whose sums stay in the L2 cache.
#include "grad_weight.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "axes.h"
#include "bn_blocks.h"
#include "isa.h"
#include "memory_format.h"

#define CONVBN_LOOPS "products.inl"
#include "each_isa.inl"

namespace convbn {

using at::IntArrayRef;
using at::Tensor;

namespace {

constexpr int64_t kPositions = 128;      // of a chunk, about
constexpr int64_t kColumns = 64;         // output channels of a block, or a multiple
constexpr int64_t kSums = 1 << 17;       // of a block, unless kColumns have more
constexpr int64_t kUnits = 16;           // of work, if there are so many chunks or blocks
constexpr int64_t kFewestChunks = 4;     // of a slice, to be worth its sums
constexpr int64_t kMostParts = 1 << 21;  // values in all slices' sums
constexpr int64_t kFewGroups = 8;        // more have a cache line of channels each, or the library is faster

// Pixels first … first + count − 1 of a row of `width`, of each `some` of its channels, as rows of `columns` values;
// zeros for what is not there.
template <class T>
void copy_pixels(const T* row, int64_t width, int64_t channels, int64_t first, int64_t count, int64_t some,
                 int64_t columns, T* to) {
  const int64_t low = std::clamp<int64_t>(-first, 0, count), high = std::clamp(width - first, low, count);
  const T* pixel = row + (first + low) * channels;
  to = std::fill_n(to, low * columns, T{0});
  if (some == channels && some == columns) {
    to = std::copy_n(pixel, (high - low) * columns, to);
  } else {
    for (int64_t w = low; w < high; ++w, pixel += channels)
      to = std::fill_n(std::copy_n(pixel, some, to), columns - some, T{0});
  }
  std::fill_n(to, (count - high) * columns, T{0});
}

// Where a thread keeps what it copies.
template <class T>
struct Room {
  AlignedVector<T> x, dy;
  std::vector<const T*> x_rows, dy_rows, A, B;
  static T* at_least(AlignedVector<T>& room, int64_t size) {
    if (static_cast<int64_t>(room.size()) < size) room = AlignedVector<T>(size);
    return room.data();
  }
};

template <class T>
struct GradWeight {
  std::array<Axis, 3> axes;
  const T *x, *dy;
  int64_t groups, rows;                          // rows of dy in all images
  int64_t from_channels, to_channels, from, to;  // of x, of dy; of a group
  int64_t kernel_rows, taps, columns, blocks;    // blocks of a group
  int64_t length, some, row_chunks, chunks;      // a chunk is `some` rows of `length` pixels
  int64_t slice, slices;                         // a slice in chunks

  GradWeight(const Tensor& grad_output, const Tensor& input, IntArrayRef sizes, const ConvGeometry& g)
      : axes(axes_of(input.sizes(), grad_output.sizes(), sizes, g)),
        x(input.const_data_ptr<T>()),
        dy(grad_output.const_data_ptr<T>()),
        groups(g.groups),
        rows(grad_output.numel() / sizes[0] / axes[2].y),
        from_channels(input.size(1)),
        to_channels(sizes[0]),
        from(sizes[1]),
        to(sizes[0] / g.groups),
        kernel_rows(axes[0].kernel * axes[1].kernel),
        taps(kernel_rows * axes[2].kernel) {
    const int64_t lanes = 64 / sizeof(T), most = std::max<int64_t>(1, kSums / (taps * from * kColumns)) * kColumns;
    columns = std::min(most, pieces(to, lanes) * lanes);
    blocks = pieces(to, columns);
    length = pieces(axes[2].y, pieces(axes[2].y, kPositions));
    some = pieces(kPositions, length);
    row_chunks = pieces(rows, some);
    chunks = pieces(axes[2].y, length) * row_chunks;
    const int64_t slices_wanted =
        std::min({pieces(kUnits, units()), pieces(chunks, kFewestChunks), kMostParts / (units() * block_sums())});
    slice = pieces(chunks, std::max<int64_t>(1, slices_wanted));
    slices = pieces(chunks, slice);
  }
  int64_t units() const { return groups * blocks; }
  int64_t block_sums() const { return taps * from * columns; }

  // The row of x that row r of dy meets with row t of the kernel, or −1.
  int64_t met(int64_t r, int64_t t) const {
    const auto& [depth, height, width] = axes;
    const int64_t d = depth.met(r / height.y % depth.y, t / height.kernel);
    const int64_t h = height.met(r % height.y, t % height.kernel);
    if (d < 0 || d >= depth.x || h < 0 || h >= height.x) return -1;
    return (r / height.y / depth.y * depth.x + d) * height.x + h;
  }

  // sums (taps, from, columns) of a block, or with `add` more of them
  void add_chunk(int64_t chunk, int64_t unit, T* sums, bool add, Room<T>& room) const {
    static const auto multiply = best_of(&baseline::add_products<T>, &avx2::add_products<T>, &avx512::add_products<T>);
    const Axis& width = axes[2];
    const int64_t group = unit / blocks, o = unit % blocks * columns, here = std::min(columns, to - o);
    const int64_t start = chunk / row_chunks * length, count = std::min(length, width.y - start);
    const int64_t first = chunk % row_chunks * some, last = std::min(rows, first + some);

    const bool whole = here * sizeof(T) % 64 == 0;
    T* dy_copy = whole ? nullptr : Room<T>::at_least(room.dy, some * length * columns);
    room.dy_rows.clear();
    for (int64_t r = first; r < last; ++r, dy_copy += whole ? 0 : length * columns) {
      const T* const row = dy + r * width.y * to_channels + group * to + o;
      if (!whole) copy_pixels(row, width.y, to_channels, start, count, here, columns, dy_copy);
      room.dy_rows.push_back(whole ? row + start * to_channels : dy_copy);
    }

    const int64_t left = width.met(start, 0), pixels = width.met(start + count - 1, width.kernel - 1) + 1 - left;
    const bool inside = groups == 1 && left >= 0 && left + pixels <= width.x;
    int64_t low = 0, high = 0;  // rows of x that this chunk meets are among these
    for (int64_t r = first; r < last; ++r)
      for (int64_t t = 0; t < kernel_rows; ++t)
        if (const int64_t at = met(r, t); at >= 0)
          low = high == 0 ? at : std::min(low, at), high = std::max(high, at + 1);
    room.x_rows.assign(high - low, nullptr);
    T* const x_copies = inside ? nullptr : Room<T>::at_least(room.x, (high - low) * pixels * from);
    const auto row_of_x = [&](int64_t at) {
      const T*& row = room.x_rows[at - low];
      if (row) return row;
      const T* const data = x + at * width.x * from_channels;
      if (inside) return row = data + left * from_channels;
      T* const copy = x_copies + (at - low) * pixels * from;
      copy_pixels(data + group * from, width.x, from_channels, left, pixels, from, from, copy);
      return row = copy;
    };

    const int64_t products = width.dilation == 1 ? 1 : width.kernel, M = from * width.kernel / products;
    for (int64_t t = 0; t < kernel_rows; ++t)
      for (int64_t j = 0; j < products; ++j, sums += M * columns) {
        room.A.clear(), room.B.clear();
        for (int64_t r = first; r < last; ++r)
          if (const int64_t at = met(r, t); at >= 0) {
            room.A.push_back(row_of_x(at) + j * width.dilation * from);
            room.B.push_back(room.dy_rows[r - first]);
          }
        multiply(room.A.data(), room.B.data(), room.A.size(), 1, width.stride * from, whole ? to_channels : columns,
                 count, sums, columns, M, whole ? here : columns, add);
      }
  }

  // (slices, groups, blocks, taps, from, columns)
  void run(T* sums) const {
    at::parallel_for(0, slices * units(), 1, [&](int64_t begin, int64_t end) {
      thread_local Room<T> room;
      for (int64_t work = begin; work < end; ++work) {
        const int64_t chunk = work / units() * slice;
        for (int64_t i = chunk; i < std::min(chunks, chunk + slice); ++i)
          add_chunk(i, work % units(), sums + work * block_sums(), i > chunk, room);
      }
    });
  }
};

template <class T>
Tensor grad_weight_of(const Tensor& grad_output, const Tensor& input, IntArrayRef sizes, const ConvGeometry& g) {
  const GradWeight<T> call(grad_output, input, sizes, g);
  const auto& [depth, height, width] = call.axes;
  const Tensor parts = at::empty({call.slices, call.units(), call.taps * call.from, call.columns},
                                 input.options().memory_format(at::MemoryFormat::Contiguous));
  call.run(parts.mutable_data_ptr<T>());
  const Tensor sum = call.slices > 1 ? parts.sum(0) : parts.select(0, 0);
  const Tensor turned = to_format(sum.unsqueeze(1).permute({0, 3, 1, 2}), at::MemoryFormat::Contiguous);
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  std::rotate(shape.begin() + 1, shape.begin() + 2, shape.end());
  return turned.view({call.groups, call.blocks * call.columns, call.taps * call.from})
      .narrow(1, 0, call.to)
      .reshape(shape)
      .movedim(-1, 1);
}

// With the channels of a pixel side by side
Tensor by_pixels(const Tensor& t) {
  const Tensor last = t.dim() == 4 ? to_format(t, at::MemoryFormat::ChannelsLast) : t;
  return last.movedim(1, -1).contiguous().movedim(-1, 1);
}

}  // namespace

bool takes_grad_weight_by_pixels(const Tensor& grad_output, const Tensor& input, const ConvGeometry& g) {
  const auto type = input.scalar_type();
  if (!input.is_cpu() || (type != at::kFloat && type != at::kDouble) || input.numel() == 0 || grad_output.numel() == 0)
    return false;
  const int64_t group = std::min(input.size(1), grad_output.size(1)) / g.groups;
  return g.groups <= kFewGroups || group * input.element_size() >= 64;
}

Tensor grad_weight_by_pixels(const Tensor& grad_output, const Tensor& input, IntArrayRef weight_sizes,
                             const ConvGeometry& g) {
  return (input.scalar_type() == at::kFloat ? grad_weight_of<float> : grad_weight_of<double>)(by_pixels(grad_output),
                                                                                              by_pixels(input),
                                                                                              weight_sizes, g);
}

}  // namespace convbn
