// Products of bfloat16 matrices in AMX tiles, for the weight's gradient. Raw pointers; a bfloat16 is a uint16_t here.
//
// A tile product is  C (16 × 16, float32) += A (16 × 32) · B (32 × 16),  A row by row, B as pairs of rows interleaved.
// Here the inner index is a position in the image: A is dyᵀ, B is x, and a tap of the kernel is a shift of x.
#pragma once
#include <cstdint>

namespace convbn {

constexpr int64_t kTileChannels = 32;   // two tiles side by side
constexpr int64_t kTilePositions = 32;  // the inner index of one product

bool amx_available();  // this CPU, this system and ATEN_CPU_CAPABILITY allow it

// One stretch of positions: rows[i] points to the channels at position i. x's positions begin `lead` before dy's, and
// end lead + 1 behind; the rows of positions that the image does not have point to zeros.
struct GradWeightChunk {
  const uint16_t *const *x_rows, *const *dy_rows;
  int64_t positions, lead;  // of dy, a multiple of kTilePositions; even
  int64_t in_channels, out_channels;
  int64_t taps;
  const int64_t* shifts;  // per tap, from −lead to lead
  uint32_t *even, *odd;   // x in pairs of positions from 0 on, from 1 on (null: no shift is odd)
  uint16_t* transposed;   // dyᵀ: transposed_size()
  int64_t pairs() const { return positions / 2 + lead; }
  static int64_t padded(int64_t channels) { return (channels + kTileChannels - 1) / kTileChannels * kTileChannels; }
  int64_t pairs_size() const { return pairs() * padded(in_channels); }
  int64_t pitch() const { return positions + kTilePositions; }  // rows of equal cache sets would push each other out
  int64_t transposed_size() const { return pitch() * padded(out_channels); }
};

// dw (padded(out_channels), taps, padded(in_channels)) += the chunk's part
void amx_grad_weight(const GradWeightChunk& chunk, float* dw);

// out[i] = Σ over slices of parts[slice·stride + i], in order, rounded once
void amx_sum_slices(const float* parts, int64_t slices, int64_t stride, int64_t count, uint16_t* out);

}  // namespace convbn
