// Tensor-core products and ldmatrix after the tables of the PTX manual (matrix fragments of mma.m16n8k8 and m16n8k16).
#include <cstring>

#include "engine.h"

namespace simt {

namespace {

// What one lane of a warp brings to an exchange.
struct Deposit {
  uint32_t word[8];
  const char* address;
};

// A rendezvous of the whole warp: each lane leaves a deposit and sees all 32, until its next exchange but one.
const Deposit* exchange(const Deposit& deposit, const void* site) {
  static Deposit deposits[1024 / kWarpLanes][2][kWarpLanes];
  Lane& lane = *current;
  auto& meeting = deposits[lane.warp][lane.exchanges++ % 2];
  meeting[lane.lane] = deposit;
  collective(Collective::exchange, ~0u, 0, 0, site);
  return meeting;
}

float operand(Operands operands, uint32_t word, unsigned half) {
  if (operands == Operands::tf32) {  // the hardware ignores the lowest 13 bits
    word &= 0xffffe000u;
    float value;
    std::memcpy(&value, &word, sizeof value);
    return value;
  }
  const auto bits = static_cast<uint16_t>(word >> (16 * half));
  if (operands == Operands::bf16) return __bfloat162float({bits});
  __half value;
  std::memcpy(&value, &bits, sizeof value);
  return __half2float(value);
}

// Reads 4 bytes as this lane's part of the warp's request.
uint32_t read_word(const char* p, const void* site) {
  memory_access(p, 4, false, false, site);
  uint32_t word;
  std::memcpy(&word, p, sizeof word);
  return word;
}

}  // namespace

void multiply(Operands operands, float* c, const uint32_t* a, const uint32_t* b, const void* site) {
  const unsigned values = operands == Operands::tf32 ? 1 : 2, depth = 8 * values;  // values per word, K
  const unsigned g = current->lane / 4, t = current->lane % 4;
  const Deposit* warp = exchange({{a[0], a[1], a[2], a[3], b[0], b[1]}, nullptr}, site);
  float row[2][16], column[2][16];  // rows g, g + 8 of A and columns 2t, 2t + 1 of B
  for (unsigned k = 0; k < depth; ++k) {
    const unsigned word = k / values;  // along the depth, 0 … 7
    for (unsigned i = 0; i < 2; ++i) {
      row[i][k] = operand(operands, warp[g * 4 + word % 4].word[i + 2 * (word / 4)], k % values);
      column[i][k] = operand(operands, warp[(2 * t + i) * 4 + word % 4].word[4 + word / 4], k % values);
    }
  }
  for (unsigned i = 0; i < 4; ++i) {
    for (unsigned k = 0; k < depth; ++k) c[i] += row[i / 2][k] * column[i % 2][k];
  }
}

void load_matrices(uint32_t* r, const void* address, bool transposed, const void* site) {
  const unsigned g = current->lane / 4, t = current->lane % 4;
  const Deposit* warp = exchange({{}, static_cast<const char*>(address)}, site);
  Deposit words{};
  for (unsigned i = 0; i < 4; ++i) words.word[i] = read_word(warp[8 * i + g].address + 4 * t, site);
  if (transposed) {  // word (row, column/2) lies with lane row·4 + column/2
    warp = exchange(words, site);
    const auto half = [&](unsigned lane, unsigned i) { return warp[lane].word[i] >> (16 * (g % 2)) & 0xffff; };
    for (unsigned i = 0; i < 4; ++i) {
      words.word[i] = half(2 * t * 4 + g / 2, i) | half((2 * t + 1) * 4 + g / 2, i) << 16;
    }
  }
  std::memcpy(r, words.word, 4 * sizeof *r);
}

}  // namespace simt
