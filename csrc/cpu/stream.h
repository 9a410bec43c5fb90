// Stores past the caches, for results larger than what is kept of them until they are read: an ordinary store first
// reads the line that it overwrites, and puts out one that may still be wanted.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace convbn {

constexpr int64_t kStreamBytes = 8 << 20;  // of a tensor, from which on it pays (measured: 2 cores, 2 MB of L2 each)

// memcpy, `to` past the caches; from is small enough to be in one. Line by line, each complete.
inline void stream_copy(void* to, const void* from, int64_t bytes) {
  auto* out = static_cast<char*>(to);
  const auto* in = static_cast<const char*>(from);
#if defined(__SSE2__)
  const int64_t head = -reinterpret_cast<intptr_t>(out) & 63;
  if (bytes >= head + 64) {
    std::memcpy(out, in, head);
    out += head, in += head, bytes -= head;
    for (; bytes >= 64; out += 64, in += 64, bytes -= 64)
      for (int i = 0; i < 64; i += 16)
        _mm_stream_si128(reinterpret_cast<__m128i*>(out + i),
                         _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i)));
    _mm_sfence();
  }
#endif
  std::memcpy(out, in, bytes);
}

}  // namespace convbn
