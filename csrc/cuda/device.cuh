// What every kernel includes. Under nvcc it is CUDA; under a host compiler with tests/simt on the include path it is a
// host implementation that runs each thread of a block as a fiber, so the same sources are executed and checked without
// a GPU.
//
//   CONVBN_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)   the only spelling of a launch
//   CONVBN_ALLOW_SHARED(kernel, bytes)                              for more than 48 KiB of dynamic shared memory
//   CONVBN_DYNAMIC_SHARED(type, name)                               the launch's dynamic shared memory as type*
// No torch header is included here, nor by any kernel.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define CONVBN_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  (kernel)<<<(grid), (block), (shared_bytes), (stream)>>>(__VA_ARGS__)
#define CONVBN_ALLOW_SHARED(kernel, bytes) \
  (void)cudaFuncSetAttribute((kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes))
#define CONVBN_DYNAMIC_SHARED(type, name)                                \
  extern __shared__ __align__(16) unsigned char convbn_dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(convbn_dynamic_shared)
#else
#include "simt.h"
#endif

namespace convbn {

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;

}  // namespace convbn
