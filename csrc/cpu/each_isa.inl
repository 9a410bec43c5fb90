// Includes the file CONVBN_LOOPS once per instruction set, in the namespaces baseline, avx2 and avx512, each a target
// region with kWordBytes (one register) defined. Such a file holds raw pointers and no includes: what a header would
// define inside a region could be called outside of it. (vectors.inl wants <immintrin.h> before all of this.) Off x86
// the other two are names of the baseline. isa.h chooses. With CONVBN_EMULATE_AVX512 (`make wide`) AVX-512's words are
// made of AVX2's instructions.

namespace baseline {
enum { kWordBytes = 16 };
#include CONVBN_LOOPS
}  // namespace baseline

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace avx2 {
enum { kWordBytes = 32 };
#include CONVBN_LOOPS
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#if defined(CONVBN_EMULATE_AVX512)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#else
#define CONVBN_AVX512
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,fma,prefer-vector-width=512")
#endif
#endif
namespace avx512 {
enum { kWordBytes = 64 };
#include CONVBN_LOOPS
}  // namespace avx512
#undef CONVBN_AVX512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#else
namespace avx2 = baseline;
namespace avx512 = baseline;
#endif
#undef CONVBN_LOOPS
