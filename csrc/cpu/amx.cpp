#include "amx.h"

#include <ATen/cpu/Utils.h>

#include <algorithm>
#include <array>

#include "isa.h"

#if defined(__x86_64__) && __has_include(<amxbf16intrin.h>)
#include <cpuid.h>
#include <immintrin.h>

namespace convbn {

bool amx_available() {
  static const bool available = [] {
    unsigned a, b, c, d;
    constexpr unsigned bf16 = 1u << 22, tile = 1u << 24;
    const bool cpu = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & bf16) && (d & tile);
    return cpu && best_of(false, false, true) && at::cpu::init_amx();
  }();
  return available;
}

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512bf16"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512bf16")
#endif

namespace {

enum { kWordBytes = 64 };
#include "transpose.inl"

using Words = Tile<uint32_t, 16>;  // 16 × 16, transposed in registers

// All eight tiles 16 rows of 64 bytes, while one of these lives.
struct Tiles {
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) config.bytes[i] = 64, config.rows[i] = 16;
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }

  // Tiles 0 to 3 are results, rows `stride` bytes apart, 4 to 7 operands.
  using Results = std::array<float*, 4>;
  static void clear() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  static void load(const Results& c, int stride) {
    _tile_loadd(0, c[0], stride);
    _tile_loadd(1, c[1], stride);
    _tile_loadd(2, c[2], stride);
    _tile_loadd(3, c[3], stride);
  }
  static void store(const Results& c, int stride) {
    _tile_stored(0, c[0], stride);
    _tile_stored(1, c[1], stride);
    _tile_stored(2, c[2], stride);
    _tile_stored(3, c[3], stride);
  }
  // (a0, a1) × (b0, b1)
  static void add_product(const uint16_t* a0, const uint16_t* a1, int stride, const uint32_t* b0, const uint32_t* b1) {
    _tile_loadd(4, a0, stride);
    _tile_loadd(6, b0, 64);
    _tile_loadd(7, b1, 64);
    _tile_loadd(5, a1, stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  // a × (b0, b1, b2, b3)
  static void add_product(const uint16_t* a, int stride, const uint32_t* b0, const uint32_t* b1, const uint32_t* b2,
                          const uint32_t* b3) {
    _tile_loadd(4, a, stride);
    _tile_loadd(5, b0, 64);
    _tile_loadd(6, b1, 64);
    _tile_loadd(7, b2, 64);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(5, b3, 64);
    _tile_dpbf16ps(1, 4, 6);
    _tile_dpbf16ps(2, 4, 7);
    _tile_dpbf16ps(3, 4, 5);
  }
};

// Two rows of up to 32 channels as 32 pairs (a, b).
struct Interleave {
  __m512i low, high;
  Interleave() {
    alignas(64) uint16_t index[2][32];
    for (int i = 0; i < 32; ++i)
      for (int half = 0; half < 2; ++half) index[half][i] = static_cast<uint16_t>(16 * half + i / 2 + i % 2 * 32);
    low = _mm512_load_si512(index[0]), high = _mm512_load_si512(index[1]);
  }
  template <class Vector>
  void operator()(const uint16_t* a, const uint16_t* b, __mmask32 of_a, __mmask32 of_b, Vector& first,
                  Vector& second) const {
    const __m512i x = _mm512_maskz_loadu_epi16(of_a, a), y = _mm512_maskz_loadu_epi16(of_b, b);
    first = (Vector)_mm512_permutex2var_epi16(x, low, y);
    second = (Vector)_mm512_permutex2var_epi16(x, high, y);
  }
};

__mmask32 lanes(int64_t left) { return left >= 32 ? ~__mmask32{0} : (__mmask32{1} << left) - 1; }

// [channels / 16][pairs][16] pairs of positions
void pack_pairs(const uint16_t* const* rows, int64_t pairs, int64_t channels, uint32_t* out) {
  const Interleave interleave;
  for (int64_t q = 0; q < pairs; ++q)
    for (int64_t c = 0; c < channels; c += 32) {
      __m512i first, second;
      const __mmask32 mask = lanes(channels - c);
      interleave(rows[2 * q] + c, rows[2 * q + 1] + c, mask, mask, first, second);
      _mm512_store_si512(out + c * pairs + 16 * q, first);
      if (channels - c > 16) _mm512_store_si512(out + (c + 16) * pairs + 16 * q, second);
    }
}

// [channels][pitch]
void pack_transposed(const uint16_t* const* rows, int64_t positions, int64_t channels, uint16_t* out, int64_t pitch) {
  const Interleave interleave;
  for (int64_t p = 0; p < positions; p += 32)
    for (int64_t c = 0; c < channels; c += 32) {
      Words::row first[16], second[16];
      const __mmask32 mask = lanes(channels - c);
      for (int i = 0; i < 16; ++i)
        interleave(rows[p + 2 * i] + c, rows[p + 2 * i + 1] + c, mask, mask, first[i], second[i]);
      Words::exchange<1>(first), Words::exchange<1>(second);
      for (int i = 0; i < 16; ++i) {
        _mm512_storeu_si512(out + (c + i) * pitch + p, (__m512i)first[i]);
        _mm512_storeu_si512(out + (c + 16 + i) * pitch + p, (__m512i)second[i]);
      }
    }
}

int stride_of(int64_t elements, size_t size) { return static_cast<int>(elements * static_cast<int64_t>(size)); }

}  // namespace

int64_t packed_weight_size(int64_t out_channels, int64_t taps, int64_t in_channels) {
  return padded_channels(out_channels) * taps * padded_channels(in_channels) / 2;
}

void amx_pack_weight(const uint16_t* weight, int64_t out_channels, int64_t taps, int64_t in_channels, bool adjoint,
                     int64_t o, uint32_t* packed) {
  const Interleave interleave;
  const int64_t row = taps * in_channels;
  const auto tile = [&](int64_t n, int64_t tap, int64_t k, int64_t inner) {
    return packed + ((n / 16 * taps + tap) * (padded_channels(inner) / 32) + k / 32) * 256;
  };
  for (int64_t tap = 0; tap < taps; ++tap)
    for (int64_t i = 0; i < padded_channels(in_channels); i += 32) {
      // 32 × 32 weights; rows beyond the last are zero
      const __mmask32 columns = lanes(in_channels - i);
      const auto source = [&](int64_t r) { return weight + (o + r) * row + tap * in_channels + i; };
      const auto mask = [&](int64_t r) { return o + r < out_channels ? columns : __mmask32{0}; };
      if (adjoint) {
        for (int64_t r = 0; r < 32; r += 2) {
          __m512i first, second;
          interleave(source(r), source(r + 1), mask(r), mask(r + 1), first, second);
          _mm512_store_si512(tile(i, tap, o, out_channels) + 8 * r, first);
          _mm512_store_si512(tile(i + 16, tap, o, out_channels) + 8 * r, second);
        }
      } else {
        for (int64_t half = 0; half < 32; half += 16) {
          Words::row words[16];
          for (int r = 0; r < 16; ++r)
            words[r] = (Words::row)_mm512_maskz_loadu_epi16(mask(half + r), source(half + r));
          Words::exchange<1>(words);
          for (int r = 0; r < 16; ++r)
            _mm512_store_si512(tile(o + half, tap, i, in_channels) + 16 * r, (__m512i)words[r]);
        }
      }
    }
}

void amx_convolve(const ConvolveChunk& k) {
  const int64_t columns = padded_channels(k.in_channels), blocks = columns / 32, tile_column = k.taps * blocks * 256;
  for (int64_t p = 0; p < k.positions + 2 * k.lead; ++p)
    for (int64_t c = 0; c < columns; c += 32)
      _mm512_storeu_si512(k.copy + p * columns + c,
                          _mm512_maskz_loadu_epi16(lanes(k.in_channels - c), k.x_rows[p] + c));
  const Tiles tiles;
  alignas(64) float results[32][32];
  const int a_stride = stride_of(columns, sizeof(uint16_t)), c_stride = sizeof results[0];
  for (int64_t o = 0; o < k.out_channels; o += kTileChannels)
    for (int64_t p = 0; p < k.positions; p += kTilePositions) {
      const uint32_t *b0 = k.weight + o / 16 * tile_column, *b1 = b0 + tile_column;
      Tiles::clear();
      for (int64_t tap = 0; tap < k.taps; ++tap) {
        const uint16_t* a0 = k.copy + (p + k.lead + k.shifts[tap]) * columns;
        const uint16_t* a1 = a0 + 16 * columns;
        for (int64_t block = 0; block < blocks; ++block, a0 += 32, a1 += 32, b0 += 256, b1 += 256)
          Tiles::add_product(a0, a1, a_stride, b0, b1);
      }
      Tiles::store({results[0], results[0] + 16, results[16], results[16] + 16}, c_stride);
      const __mmask32 mask = lanes(k.out_channels - o);
      for (int64_t r = 0; r < kTilePositions; ++r)
        if (uint16_t* const y = k.y_rows[p + r])
          _mm512_mask_storeu_epi16(
              y + o, mask, (__m512i)_mm512_cvtne2ps_pbh(_mm512_load_ps(results[r] + 16), _mm512_load_ps(results[r])));
    }
}

void amx_grad_weight(const GradWeightChunk& k, float* dw) {
  const int64_t pairs = k.pairs(), pitch = k.pitch();
  const int64_t rows = padded_channels(k.out_channels), columns = padded_channels(k.in_channels), ld = k.taps * columns;
  pack_transposed(k.dy_rows, k.positions, k.out_channels, k.transposed, pitch);
  pack_pairs(k.x_rows, pairs, k.in_channels, k.even);
  if (k.odd) pack_pairs(k.x_rows + 1, pairs, k.in_channels, k.odd);
  const Tiles tiles;
  const int a_stride = stride_of(pitch, sizeof(uint16_t)), c_stride = stride_of(ld, sizeof(float));
  for (int64_t row = 0; row < rows; row += kTileChannels)
    for (int64_t column = 0; column < columns; column += kTileChannels) {
      // Tiles of x: a tap has two, or one for up to 16 channels. Two at a time, or four for up to 16 rows of dyᵀ; where
      // too few are left, the last one again, with the same result.
      const int64_t halves = k.in_channels - column > 16 ? 2 : 1, tiles = k.taps * halves;
      const bool narrow = k.out_channels - row <= 16;
      const uint16_t *a0 = k.transposed + row * pitch, *a1 = a0 + 16 * pitch;
      for (int64_t first = 0; first < tiles; first += narrow ? 4 : 2) {
        const uint32_t* b[4];
        Tiles::Results c;
        for (int64_t i = 0; i < 4; ++i) {
          const int64_t n = std::min(first + (narrow ? i : i % 2), tiles - 1), tap = n / halves;
          const int64_t half = n % halves * 16, start = k.starts[tap];
          b[i] = (start % 2 ? k.odd : k.even) + (column + half) * pairs + start / 2 * 16;
          c[i] = dw + (row + (narrow ? 0 : i / 2 * 16)) * ld + tap * columns + column + half;
        }
        k.first ? Tiles::clear() : Tiles::load(c, c_stride);
        for (int64_t p = 0; p < k.positions; p += kTilePositions)
          narrow ? Tiles::add_product(a0 + p, a_stride, b[0] + 8 * p, b[1] + 8 * p, b[2] + 8 * p, b[3] + 8 * p)
                 : Tiles::add_product(a0 + p, a1 + p, a_stride, b[0] + 8 * p, b[1] + 8 * p);
        Tiles::store(c, c_stride);
      }
    }
}

void amx_sum_slices(const float* parts, int64_t slices, int64_t stride, int64_t count, uint16_t* out) {
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 mask = count - i >= 16 ? 0xffff : (1u << (count - i)) - 1;
    __m512 sum = _mm512_maskz_loadu_ps(mask, parts + i);
    for (int64_t s = 1; s < slices; ++s) sum += _mm512_maskz_loadu_ps(mask, parts + s * stride + i);
    _mm256_mask_storeu_epi16(out + i, mask, (__m256i)_mm512_cvtneps_pbh(sum));
  }
}

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

}  // namespace convbn

#else

namespace convbn {
bool amx_available() { return false; }
void amx_grad_weight(const GradWeightChunk&, float*) {}
int64_t packed_weight_size(int64_t, int64_t, int64_t) { return 0; }
void amx_pack_weight(const uint16_t*, int64_t, int64_t, int64_t, bool, int64_t, uint32_t*) {}
void amx_convolve(const ConvolveChunk&) {}
void amx_sum_slices(const float*, int64_t, int64_t, int64_t, uint16_t*) {}
}  // namespace convbn

#endif
