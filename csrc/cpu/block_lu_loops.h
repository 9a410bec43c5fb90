// The loops of block_lu.inl for the instruction set at hand.
#pragma once
#include <cstdint>
#include <type_traits>

#include "isa.h"

#define CONVBN_LOOPS "block_lu.inl"
#include "each_isa.inl"

namespace convbn {
namespace {

#define LOOPS_OF(isa)                                                                                               \
  Loops {                                                                                                           \
    isa::multiply, isa::subtract_row, isa::add_squares, isa::invert, isa::transpose, isa::advance, isa::load_panel, \
        isa::load_panel, isa::store_panel, isa::store_panel, int64_t(isa::kPivots)                                  \
  }
struct Loops {
  decltype(&baseline::multiply) multiply;
  decltype(&baseline::subtract_row) subtract_row;
  decltype(&baseline::add_squares) add_squares;
  decltype(&baseline::invert) invert;
  decltype(&baseline::transpose) transpose;
  decltype(&baseline::advance) advance;
  decltype(&baseline::load_panel<float>) load_f32;
  decltype(&baseline::load_panel<double>) load_f64;
  decltype(&baseline::store_panel<float>) store_f32;
  decltype(&baseline::store_panel<double>) store_f64;
  int64_t pivots;

  template <class scalar_t>
  const auto& load() const {
    if constexpr (std::is_same_v<scalar_t, float>)
      return load_f32;
    else
      return load_f64;
  }
  template <class scalar_t>
  const auto& store() const {
    if constexpr (std::is_same_v<scalar_t, float>)
      return store_f32;
    else
      return store_f64;
  }
};

const Loops& loops() {
  static const Loops best = best_of(LOOPS_OF(baseline), LOOPS_OF(avx2), LOOPS_OF(avx512));
  return best;
}
#undef LOOPS_OF

}  // namespace
}  // namespace convbn
