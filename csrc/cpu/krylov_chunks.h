// How the Krylov verbs cut long vectors into chunks and hand them to threads; see krylov_cpu.cpp.
#pragma once
#include <ATen/Parallel.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

namespace convbn {
namespace {

constexpr int64_t kChunkBytes = 4096;     // a chunk of w and of four basis vectors fit in L1
constexpr int64_t kBasisBytes = 1 << 20;  // a chunk of all basis vectors fits in L2
constexpr double kCancels = 0.5;          // part of ‖w‖² that must be left of w, or it is projected again
constexpr int64_t kMinChunkBytes = 1024;  // below this the sums at the end of a chunk cost as much as the chunk

// Length in reals of the chunks that a vector is cut into.
template <class real>
int64_t chunk_length(int64_t k) {
  int64_t bytes = kChunkBytes;
  while (bytes > kMinChunkBytes && k * bytes > kBasisBytes) bytes /= 2;
  return bytes / int64_t(sizeof(real));
}

// Exponent e such that 2⁻ᵉ·x can be squared and summed without leaving the range; 0 wherever that holds for x itself.
template <class real>
int safe_exponent(double amax) {
  constexpr int low = std::is_same_v<real, float> ? -30 : -400, high = std::is_same_v<real, float> ? 40 : 400;
  if (amax == 0 || !std::isfinite(amax)) return 0;
  int e = 0;
  std::frexp(amax, &e);
  return e < low || e > high ? e : 0;
}

// One vector per system, cut into chunks: calls work(system, chunk) for every pair, last ones first when `backwards` is
// set, over threads when `split` is set.
template <class Work>
void for_each_chunk(int64_t first, int64_t last, int64_t chunks, bool split, bool backwards, const Work& work) {
  const auto range = [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t i = backwards ? begin + end - 1 - k : k;
      work(i / chunks, i % chunks);
    }
  };
  if (split)
    at::parallel_for(first * chunks, last * chunks, 1, range);
  else
    range(first * chunks, last * chunks);
}

// Runs body(first, last, split) over all systems: whole systems to threads, or, with too few of them, the chunks of
// all.
template <class Body>
void over_systems(int64_t systems, const Body& body) {
  if (systems < at::get_num_threads()) return body(int64_t(0), systems, true);
  at::parallel_for(0, systems, 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) body(s, s + 1, false);
  });
}

}  // namespace
}  // namespace convbn
