// Few groups, or wide ones: with zeros beside the rows of x, a row i of the kernel has
//   dw[i, (j, c), o] = Σ_r Σ_w x[r·s + i·d − p, w·s + j·d − p, c] dy[r, w, o],
// a sum of products of matrices that lie in rows of x and dy, of which those of one group are copied. If d = 1, (j, c)
// counts along a row of x, and one product has all taps of a row of the kernel. With three axes r and i have two
// indices each.
//
// A chunk is some rows of dy, or a piece of a row. Chunks are cut into slices by the shape alone, whose sums are added
// at the end, in order. Work is slices times blocks of output channels, whose sums stay in the L2 cache. bfloat16 is
// copied as float32.
//
// Narrow groups are computed as fewer, wider ones, of which dw are the blocks on the diagonal.
#include "grad_weight.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "amx.h"
#include "axes.h"
#include "bn_blocks.h"
#include "convolution_amx.h"
#include "depthwise.h"
#include "isa.h"
#include "memory_format.h"

#define CONVBN_LOOPS "grad_weight.inl"
#include "each_isa.inl"

namespace convbn {

using at::IntArrayRef;
using at::Tensor;

namespace {

constexpr int64_t kPositions = 128;               // of a chunk, about
constexpr int64_t kColumns = 64;                  // output channels of a block, or a multiple
constexpr int64_t kSums = 1 << 17;                // of a block, unless kColumns have more
constexpr int64_t kUnits = 16;                    // of work, if there are so many chunks or blocks
constexpr int64_t kFewestChunks = 4;              // of a slice, to be worth its sums
constexpr int64_t kMostParts = 1 << 21;           // values in all slices' sums
constexpr int64_t kFewGroups = 8, kFewPairs = 9;  // of channels in a group
constexpr int64_t kLineBytes = 64;                // of a cache line, the widest register

// Pixels first … first + count − 1 of a row of `width`, of each `some` of its channels, as rows of `columns` values;
// zeros for what is not there.
template <class S, class T>
void copy_pixels(const S* row, int64_t width, int64_t channels, int64_t first, int64_t count, int64_t some,
                 int64_t columns, T* to) {
  const int64_t low = std::clamp<int64_t>(-first, 0, count), high = std::clamp(width - first, low, count);
  const S* pixel = row + (first + low) * channels;
  to = std::fill_n(to, low * columns, T{0});
  if (some == channels && some == columns) {
    to = std::copy_n(pixel, (high - low) * columns, to);
  } else {
    for (int64_t w = low; w < high; ++w, pixel += channels)
      to = std::fill_n(std::copy_n(pixel, some, to), columns - some, T{0});
  }
  std::fill_n(to, (count - high) * columns, T{0});
}

// The row of x that row r of dy, of all images' rows, meets with row t of the kernel, or −1.
int64_t met(const Axes& axes, int64_t r, int64_t t) {
  const auto& [depth, height, width] = axes;
  const int64_t d = depth.met(r / height.y % depth.y, t / height.kernel);
  const int64_t h = height.met(r % height.y, t % height.kernel);
  if (d < 0 || d >= depth.x || h < 0 || h >= height.x) return -1;
  return (r / height.y / depth.y * depth.x + d) * height.x + h;
}

// Where a thread keeps what it copies.
template <class T>
struct Room {
  AlignedVector<T> x, dy;
  std::vector<const T*> x_rows, dy_rows, A, B;
};

// S: of x and dy, T: of the sums
template <class S, class T>
struct GradWeight {
  static constexpr bool kCopies = !std::is_same_v<S, T>;  // all
  Axes axes;
  const S *x, *dy;
  int64_t groups, rows;                          // rows of dy in all images
  int64_t from_channels, to_channels, from, to;  // of x, of dy; of a group
  int64_t kernel_rows, taps, columns, blocks;    // blocks of a group
  int64_t length, some, row_chunks, chunks;      // a chunk is `some` rows of `length` pixels
  int64_t slice, slices;                         // a slice in chunks

  GradWeight(const Tensor& grad_output, const Tensor& input, IntArrayRef sizes, const ConvGeometry& g)
      : axes(axes_of(input.sizes(), grad_output.sizes(), sizes, g)),
        x(input.const_data_ptr<S>()),
        dy(grad_output.const_data_ptr<S>()),
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
  static const T* as_they_are(const S* row) {
    if constexpr (kCopies)
      return nullptr;
    else
      return row;
  }

  // sums (taps, from, columns) of a block, or with `add` more of them
  void add_chunk(int64_t chunk, int64_t unit, T* sums, bool add, Room<T>& room) const {
    static const auto multiply = best_of(&baseline::add_products<T>, &avx2::add_products<T>, &avx512::add_products<T>);
    const Axis& width = axes[2];
    const int64_t group = unit / blocks, o = unit % blocks * columns, here = std::min(columns, to - o);
    const int64_t start = chunk / row_chunks * length, count = std::min(length, width.y - start);
    const int64_t first = chunk % row_chunks * some, last = std::min(rows, first + some);

    const bool whole = !kCopies && groups == 1 && here * sizeof(T) % 64 == 0;
    T* dy_copy = whole ? nullptr : at_least(room.dy, some * length * columns);
    room.dy_rows.clear();
    for (int64_t r = first; r < last; ++r, dy_copy += whole ? 0 : length * columns) {
      const S* const row = dy + r * width.y * to_channels + group * to + o;
      if (!whole) copy_pixels(row, width.y, to_channels, start, count, here, columns, dy_copy);
      room.dy_rows.push_back(whole ? as_they_are(row + start * to_channels) : dy_copy);
    }

    const int64_t left = width.met(start, 0), pixels = width.met(start + count - 1, width.kernel - 1) + 1 - left;
    const bool inside = !kCopies && groups == 1 && left >= 0 && left + pixels <= width.x;
    int64_t low = 0, high = 0;  // rows of x that this chunk meets are among these
    for (int64_t r = first; r < last; ++r)
      for (int64_t t = 0; t < kernel_rows; ++t)
        if (const int64_t at = met(axes, r, t); at >= 0)
          low = high == 0 ? at : std::min(low, at), high = std::max(high, at + 1);
    room.x_rows.assign(high - low, nullptr);
    T* const x_copies = inside ? nullptr : at_least(room.x, (high - low) * pixels * from);
    const auto row_of_x = [&](int64_t at) {
      const T*& row = room.x_rows[at - low];
      if (row) return row;
      const S* const data = x + at * width.x * from_channels;
      if (inside) return row = as_they_are(data + left * from_channels);
      T* const copy = x_copies + (at - low) * pixels * from;
      copy_pixels(data + group * from, width.x, from_channels, left, pixels, from, from, copy);
      return row = copy;
    };

    const int64_t products = width.dilation == 1 ? 1 : width.kernel, M = from * width.kernel / products;
    for (int64_t t = 0; t < kernel_rows; ++t)
      for (int64_t j = 0; j < products; ++j, sums += M * columns) {
        room.A.clear(), room.B.clear();
        for (int64_t r = first; r < last; ++r)
          if (const int64_t at = met(axes, r, t); at >= 0) {
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

template <class S, class T>
Tensor grad_weight_of(const Tensor& grad_output, const Tensor& input, IntArrayRef sizes, const ConvGeometry& g) {
  const GradWeight<S, T> call(grad_output, input, sizes, g);
  const Tensor parts =
      at::empty({call.slices, call.units(), call.taps * call.from, call.columns}, c10::CppTypeToScalarType<T>::value);
  call.run(parts.mutable_data_ptr<T>());
  const Tensor sum = call.slices > 1 ? parts.sum(0) : parts.select(0, 0);
  const Tensor turned = to_format(sum.unsqueeze(1).permute({0, 3, 1, 2}), at::MemoryFormat::Contiguous);
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  std::rotate(shape.begin() + 1, shape.begin() + 2, shape.end());
  return turned.view({call.groups, call.blocks * call.columns, call.taps * call.from})
      .narrow(1, 0, call.to)
      .reshape(shape)
      .movedim(-1, 1)
      .to(input.scalar_type());
}

// ---- plane by plane: dw[o, c, i, j] = Σ_r Σ_w x[c, r·s + i·d − p, w·s + j·d − p] dy[o, r, w] ----

// A row between zeros, its columns in order of their remainder of the stride: (stride, length)
template <class T>
void copy_phases(const T* row, const Axis& axis, int64_t length, T* to) {
  for (int64_t phase = 0; phase < axis.stride; ++phase, to += length) {
    // column i·stride + phase − padding
    const int64_t before = axis.padding - phase, low = std::clamp<int64_t>(pieces(before, axis.stride), 0, length);
    const int64_t high = std::clamp<int64_t>(pieces(axis.x + before, axis.stride), low, length);
    const T* const from = row + phase - axis.padding;
    std::fill_n(to, low, T{0});
    if (axis.stride == 1)
      std::copy(from + low, from + high, to + low);
    else
      for (int64_t i = low; i < high; ++i) to[i] = from[i * axis.stride];
    std::fill(to + high, to + length, T{0});
  }
}

template <class T>
Tensor grad_weight_of_planes(const Tensor& grad_output, const Tensor& input, IntArrayRef sizes, const ConvGeometry& g) {
  static const auto correlate = best_of(&baseline::correlate<T>, &avx2::correlate<T>, &avx512::correlate<T>);
  const Tensor x_planes = input.contiguous(), dy_planes = grad_output.contiguous();
  const Axes axes = axes_of(input.sizes(), grad_output.sizes(), sizes, g);
  const auto& [depth, height, width] = axes;
  const int64_t images = input.size(0), channels = input.size(1), to = sizes[0], from = sizes[1], pairs = to * from;
  const int64_t kernel_rows = depth.kernel * height.kernel, taps = kernel_rows * width.kernel, lanes = 64 / sizeof(T);
  const int64_t x_rows = depth.x * height.x, dy_rows = depth.y * height.y, columns = pieces(width.y, lanes) * lanes;
  const int64_t length = columns + pieces(width.kernel * width.dilation, width.stride);  // of a phase
  std::vector<int64_t> offsets;
  for (int64_t j = 0; j < width.kernel; ++j)
    offsets.push_back(j * width.dilation % width.stride * length + j * width.dilation / width.stride);
  const int64_t slice = pieces(images, std::min(images, pieces(kUnits, pairs))), slices = pieces(images, slice);
  const Tensor parts = at::zeros({slices, pairs, taps}, at::kDouble);
  double* const sums = parts.mutable_data_ptr<double>();
  const T *const x = x_planes.const_data_ptr<T>(), *const dy = dy_planes.const_data_ptr<T>();
  at::parallel_for(0, slices * pairs, 1, [&](int64_t begin, int64_t end) {
    thread_local Room<T> room;
    T* const x_copy = at_least(room.x, x_rows * width.stride * length);
    T* const dy_copy = at_least(room.dy, dy_rows * columns);
    std::vector<int64_t> ends{0};  // of the pairs of rows that meet, for each row of the kernel
    room.A.clear(), room.B.clear();
    for (int64_t t = 0; t < kernel_rows; ++t) {
      for (int64_t r = 0; r < dy_rows; ++r)
        if (const int64_t at = met(axes, r, t); at >= 0) {
          room.A.push_back(x_copy + at * width.stride * length);
          room.B.push_back(dy_copy + r * columns);
        }
      ends.push_back(room.A.size());
    }
    for (int64_t work = begin; work < end; ++work) {
      const int64_t first = work / pairs * slice, o = work % pairs / from, c = o / (to / g.groups) * from + work % from;
      for (int64_t n = first; n < std::min(images, first + slice); ++n) {
        const T* const x_plane = x + (n * channels + c) * x_rows * width.x;
        const T* const dy_plane = dy + (n * to + o) * dy_rows * width.y;
        for (int64_t r = 0; r < x_rows; ++r)
          copy_phases(x_plane + r * width.x, width, length, x_copy + r * width.stride * length);
        for (int64_t r = 0; r < dy_rows; ++r)
          std::fill_n(std::copy_n(dy_plane + r * width.y, width.y, dy_copy + r * columns), columns - width.y, T{0});
        for (int64_t t = 0; t < kernel_rows; ++t)
          correlate(room.A.data() + ends[t], room.B.data() + ends[t], ends[t + 1] - ends[t], columns, offsets.data(),
                    width.kernel, sums + work * taps + t * width.kernel);
      }
    }
  });
  return parts.sum(0).to(input.scalar_type()).view(sizes);
}

// ---- which of these ----

template <class T>
Tensor of_planes(const Tensor& grad_output, const Tensor& input, IntArrayRef weight, const ConvGeometry& g) {
  const auto type = c10::CppTypeToScalarType<T>::value;
  return grad_weight_of_planes<T>(grad_output.to(type), input.to(type), weight, g).to(input.scalar_type());
}

// `some` groups as one, of which dw has the blocks on the diagonal
Tensor of_merged(const Tensor& grad_output, const Tensor& input, IntArrayRef weight, const ConvGeometry& g,
                 int64_t some) {
  const int64_t groups = g.groups / some, to = weight[0] / g.groups, from = weight[1];
  ConvGeometry merged = g;
  merged.groups = groups;
  std::vector<int64_t> wider = weight.vec();
  wider[1] *= some;
  const Tensor blocks = own_grad_weight(grad_output, input, wider, merged).reshape({groups, some, to, some, from, -1});
  return blocks.diagonal(0, 1, 3).permute({0, 4, 1, 2, 3}).reshape(weight);
}

// How many groups as one, a divisor of all, cost least: products of whole registers and the copies for each.
int64_t groups_to_merge(int64_t groups, int64_t from, int64_t to, int64_t lanes) {
  const auto cost = [&](int64_t some) {
    return groups / some * pieces(some * to, lanes) * lanes * (some * from + lanes);
  };
  int64_t best = 1;
  for (int64_t some = 2; some <= std::min(groups, lanes); ++some)
    if (groups % some == 0 && cost(some) < cost(best)) best = some;
  return best;
}

}  // namespace

bool takes_own_grad_weight(const Tensor& grad_output, const Tensor& input) {
  const auto type = input.scalar_type();
  return input.is_cpu() && (type == at::kFloat || type == at::kDouble || type == at::kBFloat16) && input.numel() > 0 &&
         grad_output.numel() > 0;
}

Tensor own_grad_weight(const Tensor& grad_output, const Tensor& input, IntArrayRef weight, const ConvGeometry& g) {
  const auto type = input.scalar_type();
  if (g.axes() == 1)
    return own_grad_weight(grad_output.unsqueeze(2), input.unsqueeze(2), {weight[0], weight[1], 1, weight[2]},
                           of_rows(g))
        .squeeze(2);
  if (takes_grad_weight_depthwise(grad_output, input, weight, g))
    return grad_weight_depthwise(grad_output, input, weight, g);
  const int64_t to = weight[0] / g.groups, from = weight[1];
  if (g.groups > kFewGroups && input.is_contiguous() && to * from <= kFewPairs && type != at::kBFloat16)
    return (type == at::kDouble ? of_planes<double> : of_planes<float>)(grad_output, input, weight, g);
  const int64_t lanes = type == at::kDouble                        ? kLineBytes / sizeof(double)
                        : type == at::kBFloat16 && amx_available() ? kTileChannels
                                                                   : kLineBytes / sizeof(float);
  const int64_t some = groups_to_merge(g.groups, from, to, lanes);
  if (some > 1) return of_merged(grad_output, input, weight, g, some);
  if (takes_grad_weight_amx(grad_output, input, weight, g)) return grad_weight_amx(grad_output, input, weight, g);
  const auto format = last_format(g.axes());
  const Tensor dy = to_format(grad_output, format), x = to_format(input, format);
  return type == at::kDouble  ? grad_weight_of<double, double>(dy, x, weight, g)
         : type == at::kFloat ? grad_weight_of<float, float>(dy, x, weight, g)
                              : grad_weight_of<at::BFloat16, float>(dy, x, weight, g);
}

}  // namespace convbn
