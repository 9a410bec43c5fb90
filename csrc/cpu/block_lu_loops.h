// The loops of block_lu.inl for the instruction set at hand (at::get_cpu_capability(), ATEN_CPU_CAPABILITY lowers it).
#pragma once
#include <ATen/Version.h>

#include <cstdint>
#include <string>
#include <type_traits>

namespace baseline {
constexpr int kWordBytes = 16, kTileWords = 2;
#include "block_lu.inl"
}  // namespace baseline

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace avx2 {
constexpr int kWordBytes = 32, kTileWords = 2;
#include "block_lu.inl"
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,fma,prefer-vector-width=512")
#endif
namespace avx512 {
constexpr int kWordBytes = 64, kTileWords = 4;
#include "block_lu.inl"
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

namespace convbn {
namespace {

#define CONVBN_LOOPS(isa)                                                                                      \
  {isa::multiply,   isa::subtract_row, isa::add_squares, isa::invert,      isa::transpose,       isa::advance, \
   isa::load_panel, isa::load_panel,   isa::store_panel, isa::store_panel, int64_t(isa::kPivots)}
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
  static const Loops best = []() -> Loops {
    [[maybe_unused]] const std::string isa = at::get_cpu_capability();
#if defined(__x86_64__)
    if (isa == "AVX512") return CONVBN_LOOPS(avx512);
    if (isa == "AVX2") return CONVBN_LOOPS(avx2);
#endif
    return CONVBN_LOOPS(baseline);
  }();
  return best;
}
#undef CONVBN_LOOPS

}  // namespace
}  // namespace convbn
