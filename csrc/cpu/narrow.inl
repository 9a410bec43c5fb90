// Products of small matrices that lie in images; the loops of narrow.cpp. Included like each_isa.inl does: kWordBytes
// is defined. A tile of the result stays in registers: each step of the sum loads its words of b and a value of a for
// each of its rows. The last word of a row overlaps the one before it, so that no word is cut short.

#if defined(__clang__)
#define CONVBN_UNROLL _Pragma("clang loop unroll(full)")
#else
#define CONVBN_UNROLL _Pragma("GCC unroll 16")
#endif

// Lanes of a word; rows of a tile of two words, so that sums, words of b and a value of a fill the registers: 32 with
// AVX-512, otherwise 16.
enum { kLanes = kWordBytes / 4, kTileRows = kWordBytes == 64 ? 14 : 6 };

typedef float word __attribute__((vector_size(kWordBytes)));
typedef float unaligned_word __attribute__((vector_size(kWordBytes), aligned(4), may_alias));

// Rows m … m + rows − 1, words from columns n and last on; the first `known` values of the last word are another's.
template <int rows, int words, bool transposed>
void product_tile(const ProductArgs& args, int64_t m, int64_t n, int64_t last, int known) {
  const int64_t stride = args.a_stride, columns = args.columns, to_last = last - n;
  const float* b = args.b + n;
  word sum[rows][words] = {};
  for (int64_t s = 0; s < args.segments; ++s) {
    // four rows to a pointer: such multiples of the stride are addresses that x86 has
    const float* a[(rows + 3) / 4];
    CONVBN_UNROLL
    for (int r = 0; r < rows; r += 4) a[r / 4] = args.a[s] + (m + r) * (transposed ? 1 : stride);
    for (int64_t k = 0; k < args.depth; ++k, b += columns) {
      word v[words];
      v[0] = *reinterpret_cast<const unaligned_word*>(b);
      if constexpr (words > 1) v[1] = *reinterpret_cast<const unaligned_word*>(b + to_last);
      CONVBN_UNROLL
      for (int r = 0; r < rows; ++r) CONVBN_UNROLL
      for (int w = 0; w < words; ++w) sum[r][w] += v[w] * a[r / 4][r % 4 * (transposed ? 1 : stride)];
      CONVBN_UNROLL
      for (int r = 0; r < rows; r += 4) a[r / 4] += transposed ? stride : 1;
    }
  }
  if constexpr (transposed)
    for (int r = 0; r < rows; ++r)
      for (int lane = 0; lane < known; ++lane) sum[r][words - 1][lane] = 0;
  float* out = args.out + m * columns + n;
  CONVBN_UNROLL
  for (int r = 0; r < rows; ++r, out += columns) CONVBN_UNROLL
  for (int w = 0; w < words; ++w) {
    unaligned_word& to = *reinterpret_cast<unaligned_word*>(w ? out + to_last : out);
    to = transposed ? to + sum[r][w] : sum[r][w];
  }
}

template <int rows, bool transposed>
void product_rows(const ProductArgs& args, int64_t m) {
  const int64_t end = args.columns - kLanes;  // where the last word begins
  for (int64_t n = 0; n < args.columns; n += 2 * kLanes) {
    const int64_t first = n < end ? n : end, next = n + kLanes < end ? n + kLanes : end;
    if (n + kLanes < args.columns)
      product_tile<rows, 2, transposed>(args, m, first, next, int(n + kLanes - next));
    else
      product_tile<rows, 1, transposed>(args, m, first, first, int(n - first));
  }
}

template <bool transposed, int rows = kTileRows>
void product_of(const ProductArgs& args, int64_t m, int64_t count) {
  if constexpr (rows > 1)
    if (count < rows) return product_of<transposed, rows - 1>(args, m, count);
  product_rows<rows, transposed>(args, m);
}

// In tiles of about the same height
template <bool transposed>
void product(const ProductArgs& args) {
  int64_t m = 0;
  for (int64_t tiles = (args.rows + kTileRows - 1) / kTileRows; tiles > 0; --tiles) {
    const int64_t count = (args.rows - m + tiles - 1) / tiles;
    product_of<transposed>(args, m, count);
    m += count;
  }
}

inline void gather(const GatherArgs& args) {
  typedef float four __attribute__((vector_size(16)));
  typedef float unaligned_four __attribute__((vector_size(16), aligned(4), may_alias));
  float* out = args.out;
  for (int64_t q = 0; q < args.count; ++q, out += args.channels) {
    // taps j with a pixel (at − j)/stride below `width`
    const int64_t at = q + args.padding, low = at - (args.width - 1) * args.stride;
    const int64_t first = low > 0 ? low : at % args.stride, last = at < args.kernel ? at : args.kernel - 1;
    four sum = {};
    for (int64_t j = first; j <= last; j += args.stride) {
      const int64_t offset = (at - j) / args.stride * args.pixel + j * args.channels;
      for (int64_t i = 0; i < args.row_count; ++i)
        sum += *reinterpret_cast<const unaligned_four*>(args.rows[i] + offset);
    }
    *reinterpret_cast<unaligned_four*>(out) = sum;
  }
}
