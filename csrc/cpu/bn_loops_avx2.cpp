// The loops for AVX2 and FMA.
#include "bn_loops.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace convbn::avx2 {
enum { kWordBytes = 32 };
#include "bn_loops.inl"
}  // namespace convbn::avx2
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace convbn {
const BnLoopTables bn_loops_avx2 = avx2::all_tables();
}
#endif
