// Convolutions of bfloat16 images by products of AMX tiles. Raw pointers; a bfloat16 is a uint16_t here.
//
// A tile product is  C (16 × 16, float32) += A (16 × 32) · B (32 × 16),  A row by row, B as pairs of rows interleaved.
// A tap of the kernel is a shift of positions. The inner index is, for y and dx, a channel: A is x or dy, B the weight;
// for dw a position: A is dyᵀ, B is x.
#pragma once
#include <cstdint>

namespace convbn {

constexpr int64_t kTileChannels = 32;   // two tiles side by side
constexpr int64_t kTilePositions = 32;  // the inner index of one product

inline int64_t padded_channels(int64_t channels) {
  return (channels + kTileChannels - 1) / kTileChannels * kTileChannels;
}

bool amx_available();  // this CPU, this system and ATEN_CPU_CAPABILITY allow it

// y[p, o] = Σ over taps t, channels i of x[p + shifts[t], i]·w[o, t, i] for a stretch of positions: x_rows[i] points to
// the channels at position i, from `lead` before y's first to lead behind its last, y_rows[i] to those of the result.
struct ConvolveChunk {
  const uint16_t* const* x_rows;
  uint16_t* const* y_rows;  // null: nobody wants the result
  int64_t positions, lead;  // of y, a multiple of kTilePositions
  int64_t in_channels, out_channels;
  int64_t taps;
  const int64_t* shifts;   // per tap, from −lead to lead
  const uint32_t* weight;  // packed
  uint16_t* copy;          // x with its empty positions: copy_size()
  int64_t copy_size() const { return (positions + 2 * lead) * padded_channels(in_channels); }
};
void amx_convolve(const ConvolveChunk& chunk);

// The weight (out_channels, taps, in_channels) as the second operand: [out / 16][tap][in / 32][pair][out % 16], pairs
// of in-channels; for the adjoint in and out change places. Channels beyond the last are zero.
int64_t packed_weight_size(int64_t out_channels, int64_t taps, int64_t in_channels);
void amx_pack_weight(const uint16_t* weight, int64_t out_channels, int64_t taps, int64_t in_channels, bool adjoint,
                     int64_t first_out, uint32_t* packed);

// For dw, one stretch of positions of dy: rows[i] points to the channels at position i, or to zeros where there are
// none. dy's position p meets x's starts[t] + p at tap t; x's list is one longer than x_positions.
struct GradWeightChunk {
  const uint16_t *const *x_rows, *const *dy_rows;
  int64_t x_positions, positions;  // even; of dy, a multiple of kTilePositions
  int64_t in_channels, out_channels;
  int64_t taps;
  const int64_t* starts;
  bool first;            // dw is written, not added to
  uint32_t *even, *odd;  // x in pairs of positions from 0 on, from 1 on (null: no start is odd)
  uint16_t* transposed;  // dyᵀ: transposed_size()
  int64_t pairs() const { return x_positions / 2; }
  int64_t pairs_size() const { return pairs() * padded_channels(in_channels); }
  int64_t pitch() const { return positions + kTilePositions; }  // rows of equal cache sets would push each other out
  int64_t transposed_size() const { return pitch() * padded_channels(out_channels); }
};

// dw (padded_channels(out_channels), taps, padded_channels(in_channels)) += the chunk's part, or = for the first
void amx_grad_weight(const GradWeightChunk& chunk, float* dw);

// out[i] = Σ over slices of parts[slice·stride + i], in order, rounded once
void amx_sum_slices(const float* parts, int64_t slices, int64_t stride, int64_t count, uint16_t* out);

}  // namespace convbn
