// What a kernel sees of CUDA when a host compiler builds it: qualifiers, indices, barriers, warp collectives, atomics,
// launches.
//
// Each thread of a block is a fiber (engine.cpp); one block runs at a time. Barriers and warp collectives are
// rendezvous: a lane waits until every lane that has to come is there. Only what the kernels of csrc/cuda use is
// offered.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "simt_half.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#ifdef __SANITIZE_ADDRESS__
#define __shared__ static  // ordinary statics have red zones
#else
#define __shared__ static thread_local  // so the library's TLS image is exactly the block's static shared memory
#endif

// Calls of the simulator are not memory accesses of the kernel, and their return address names the kernel's source
// line.
#define SIMT_CALL __attribute__((no_sanitize("thread"), noinline))

struct uint3 {
  unsigned x, y, z;
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct CUstream_st;
using cudaStream_t = CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
cudaError_t cudaGetLastError();

namespace simt {

enum class Collective { shuffle, ballot, sync, exchange };

// `const`: constant within a fiber, never instrumented, and calls may be merged.
__attribute__((const)) uint3 thread_index();
__attribute__((const)) uint3 block_index();
__attribute__((const)) dim3 block_size();
__attribute__((const)) dim3 grid_size();
__attribute__((const)) unsigned lane_index();
__attribute__((const)) void* dynamic_shared();

enum class Vote { none, any, all, count };
int barrier(int predicate, Vote vote, const void* site);

// The rendezvous of the lanes of `mask`: returns lane `source`'s value (shuffle) or the ballot of the lowest bits.
uint64_t collective(Collective kind, unsigned mask, uint64_t value, unsigned source, const void* site);

void note_atomic(const void* address, size_t bytes, const void* site);

using Body = void (*)(void* arguments);
void launch(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes, Body body, void* arguments, size_t bytes);

// Touched before each launch, so that the loader has made this library's TLS image.
inline thread_local volatile char tls_anchor;

// Arguments are converted to the parameter types and copied once, as in a real launch.
template <class... Parameters, class... Arguments>
SIMT_CALL void launch_kernel(const char* name, dim3 grid, dim3 block, size_t shared_bytes,
                             void (*kernel)(Parameters...), Arguments&&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> parameters;
  } call{kernel, std::tuple<Parameters...>(std::forward<Arguments>(arguments)...)};
  tls_anchor = 0;
  const Body body = [](void* c) { std::apply(static_cast<Call*>(c)->kernel, static_cast<Call*>(c)->parameters); };
  launch(name, grid, block, shared_bytes, body, &call, sizeof call);
}

template <class T>
SIMT_CALL T shuffle(unsigned mask, T value, unsigned source, const void* site) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = collective(Collective::shuffle, mask, bits, source, site);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace simt

#define threadIdx (simt::thread_index())
#define blockIdx (simt::block_index())
#define blockDim (simt::block_size())
#define gridDim (simt::grid_size())

#define CONVBN_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ((void)(stream), simt::launch_kernel(#kernel, grid, block, shared_bytes, kernel, __VA_ARGS__))
#define CONVBN_ALLOW_SHARED(kernel, bytes) ((void)(bytes))
#define CONVBN_DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(simt::dynamic_shared())

SIMT_CALL inline void __syncthreads() { simt::barrier(0, simt::Vote::none, __builtin_return_address(0)); }
SIMT_CALL inline int __syncthreads_or(int p) { return simt::barrier(p, simt::Vote::any, __builtin_return_address(0)); }
SIMT_CALL inline int __syncthreads_and(int p) { return simt::barrier(p, simt::Vote::all, __builtin_return_address(0)); }
SIMT_CALL inline int __syncthreads_count(int p) {
  return simt::barrier(p, simt::Vote::count, __builtin_return_address(0));
}

SIMT_CALL inline void __syncwarp(unsigned mask = ~0u) {
  simt::collective(simt::Collective::sync, mask, 0, 0, __builtin_return_address(0));
}
SIMT_CALL inline unsigned __ballot_sync(unsigned mask, int p) {
  return simt::collective(simt::Collective::ballot, mask, p != 0, 0, __builtin_return_address(0));
}
SIMT_CALL inline int __any_sync(unsigned mask, int p) {
  return simt::collective(simt::Collective::ballot, mask, p != 0, 0, __builtin_return_address(0)) != 0;
}

// Within segments of `width` lanes; a source outside the segment is the lane itself.
template <class T>
SIMT_CALL T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const unsigned lane = simt::lane_index();
  return simt::shuffle(mask, value, (lane & ~(width - 1)) | (source & (width - 1)), __builtin_return_address(0));
}
template <class T>
SIMT_CALL T __shfl_xor_sync(unsigned mask, T value, int with, int width = 32) {
  const unsigned lane = simt::lane_index(), source = lane ^ with;
  return simt::shuffle(mask, value, source <= (lane | (width - 1)) ? source : lane, __builtin_return_address(0));
}
template <class T>
SIMT_CALL T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const unsigned lane = simt::lane_index(), source = lane + delta;
  return simt::shuffle(mask, value, source <= (lane | (width - 1)) ? source : lane, __builtin_return_address(0));
}

template <class T>
SIMT_CALL T atomicAdd(T* address, std::common_type_t<T> value) {
  simt::note_atomic(address, sizeof(T), __builtin_return_address(0));
  const T old = *address;
  *address = old + value;
  return old;
}

// The store with the default cache policy, which nvcc keeps whole.
__forceinline__ void __stwb(uint4* address, uint4 value) { *address = value; }

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }

#include "simt_mma.h"
