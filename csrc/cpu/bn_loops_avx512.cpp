// The loops for AVX-512.
#include "bn_loops.h"

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(CONVBN_EMULATE_AVX512)  // see each_isa.inl
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#else
#define CONVBN_AVX512
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif
#endif
namespace convbn::avx512 {
enum { kWordBytes = 64 };
#include "bn_loops.inl"
}  // namespace convbn::avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace convbn {
const BnLoopTables bn_loops_avx512 = avx512::all_tables();
}
#endif
