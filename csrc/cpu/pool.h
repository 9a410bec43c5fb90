// Memory of large tensors, kept for the next step instead of going back to the system.
//
// malloc maps a tensor of more than 32 MB afresh and the system clears it page by page at first touch, which takes
// several times longer than a pass over memory that is there. Tensors made inside the fused operators while a
// PoolScope lives come from here, those of torch's convolution included; everything else is allocated as ever.
#pragma once
#include <cstddef>
#include <cstdint>
#include <utility>

namespace convbn {

// The calling thread's large CPU tensors come from the pool while one of these lives.
class PoolScope {
 public:
  PoolScope();
  ~PoolScope();
  PoolScope(const PoolScope&) = delete;
  PoolScope& operator=(const PoolScope&) = delete;
};

// While one of these lives they come from malloc again, if `pauses`: better for tensors that are given back at once, as
// long as malloc keeps their memory, because whoever used it last left it in a cache.
class PoolPause {
 public:
  explicit PoolPause(bool pauses);
  ~PoolPause();
  PoolPause(const PoolPause&) = delete;
  PoolPause& operator=(const PoolPause&) = delete;

 private:
  const int scopes_;
};
constexpr int64_t kPooledBytes = int64_t{4} << 20;   // below, malloc keeps memory by itself, and nearer to the caches
constexpr int64_t kMallocKeeps = int64_t{32} << 20;  // glibc keeps no larger ones

// Bytes in tensors, and bytes kept for the next ones. Together they never exceed the most that tensors had at one time.
std::pair<int64_t, int64_t> pool_bytes();
void pool_release();  // gives back what is kept

}  // namespace convbn
