// contiguous (N, C, pixels) to channels_last (N, pixels, C) and back: per sample the transposition of a matrix, cut
// into bands of rows that threads share.
#include "memory_format.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

#include "isa.h"

#define CONVBN_LOOPS "transpose.inl"
#include "each_isa.inl"

namespace convbn {

using at::Tensor;

namespace {

constexpr int64_t kBand = 64;  // rows: each column of a band fills cache lines of the output

// out[s, c, r] = in[s, r, c]
template <typename bits_t>
void transpose_each(const void* in_data, void* out_data, int64_t samples, int64_t rows, int64_t columns) {
  static const auto transpose =
      best_of(&baseline::transpose<bits_t>, &avx2::transpose<bits_t>, &avx512::transpose<bits_t>);
  const auto* in = static_cast<const bits_t*>(in_data);
  auto* out = static_cast<bits_t*>(out_data);
  const int64_t bands = (rows + kBand - 1) / kBand;
  const int64_t grain = std::max<int64_t>(1, at::internal::GRAIN_SIZE / (kBand * columns));
  at::parallel_for(0, samples * bands, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t start = i / bands * rows * columns, row = i % bands * kBand;
      transpose(in + start + row * columns, columns, std::min(kBand, rows - row), columns, out + start + row, rows);
    }
  });
}

}  // namespace

at::MemoryFormat last_format(int64_t axes) {
  return axes == 2   ? at::MemoryFormat::ChannelsLast
         : axes == 3 ? at::MemoryFormat::ChannelsLast3d
                     : at::MemoryFormat::Contiguous;
}

Tensor to_format(const Tensor& t, at::MemoryFormat format) {
  const bool to_last = format != at::MemoryFormat::Contiguous;
  const auto other = to_last ? at::MemoryFormat::Contiguous : last_format(t.dim() - 2);
  const int64_t bytes = t.element_size();
  if (t.is_contiguous(format) || !t.is_contiguous(other) || !t.is_cpu() || t.numel() == 0 ||
      (bytes != 2 && bytes != 4 && bytes != 8))
    return t.contiguous(format);
  const Tensor result = at::empty(t.sizes(), t.options().memory_format(format));
  const int64_t channels = t.size(1), plane = t.numel() / (t.size(0) * channels);
  const auto transpose = bytes == 2   ? transpose_each<uint16_t>
                         : bytes == 4 ? transpose_each<uint32_t>
                                      : transpose_each<uint64_t>;
  transpose(t.const_data_ptr(), result.mutable_data_ptr(), t.size(0), to_last ? channels : plane,
            to_last ? plane : channels);
  return result;
}

}  // namespace convbn
