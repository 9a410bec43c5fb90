// The instruction set that the inner loops use: torch's own choice, which ATEN_CPU_CAPABILITY lowers.
#pragma once
#include <ATen/Version.h>

#include <string>

namespace convbn {

template <class T>
T best_of(T baseline, T avx2, T avx512) {
  const std::string isa = at::get_cpu_capability();
#if defined(CONVBN_EMULATE_AVX512)  // see each_isa.inl
  avx2 = avx512;
#endif
  return isa.starts_with("AVX512") ? avx512 : isa.starts_with("AVX2") ? avx2 : baseline;
}

}  // namespace convbn
