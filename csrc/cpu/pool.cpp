#include "pool.h"

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <list>
#include <mutex>
#include <new>
#include <string_view>
#include <unordered_map>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace convbn {

namespace {

constexpr size_t kHugePage = size_t{2} << 20;

thread_local int scopes = 0;

// Rounded up so that similar sizes share blocks: eight steps between powers of two.
size_t block_size(size_t bytes) {
  const size_t step = std::max<size_t>(std::bit_floor(bytes) / 8, 1 << 16);
  return (bytes + step - 1) / step * step;
}

void* map(size_t size) {
  void* p = nullptr;  // aligned_alloc would want whole multiples of the alignment
  if (posix_memalign(&p, size < kHugePage ? 4096 : kHugePage, size) != 0) return nullptr;
#if defined(__linux__)
  if (size >= kHugePage)
    madvise(p, size, MADV_HUGEPAGE);  // clears 2 MB at a time; where it is refused, nothing is lost
#endif
  return p;
}

class Pool {
 public:
  void* take(size_t bytes) {
    const size_t size = block_size(bytes);
    const std::lock_guard<std::mutex> lock(mutex_);
    // the smallest kept block that fits without wasting more than a quarter; among equals the last one given back,
    // which is the likeliest to be in a cache
    auto best = kept_.end();
    for (auto block = kept_.begin(); block != kept_.end(); ++block)
      if (block->size >= size && block->size <= size + size / 4 && (best == kept_.end() || block->size < best->size))
        best = block;
    Block block{nullptr, size};
    if (best != kept_.end()) {
      block = *best;
      kept_bytes_ -= block.size;
      kept_.erase(best);
    } else {
      shrink(size);
      block.start = map(size);
      if (!block.start) {
        drop_all();
        block.start = map(size);
      }
      if (!block.start) throw std::bad_alloc();
    }
    live_bytes_ += block.size;
    most_bytes_ = std::max(most_bytes_, live_bytes_);
    live_.emplace(block.start, block.size);
    report(block.start, static_cast<int64_t>(block.size));
    return block.start;
  }

  // False if p is not from here.
  bool give_back(void* p) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = live_.find(p);
    if (found == live_.end()) return false;
    const Block block{p, found->second};
    live_.erase(found);
    live_bytes_ -= block.size;
    kept_.push_front(block);
    kept_bytes_ += block.size;
    report(p, -static_cast<int64_t>(block.size));
    return true;
  }

  void release() {
    const std::lock_guard<std::mutex> lock(mutex_);
    drop_all();
    most_bytes_ = live_bytes_;
  }

  std::pair<int64_t, int64_t> bytes() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return {static_cast<int64_t>(live_bytes_), static_cast<int64_t>(kept_bytes_)};
  }

 private:
  struct Block {
    void* start;
    size_t size;
  };
  std::mutex mutex_;
  std::list<Block> kept_;  // last given back first
  std::unordered_map<void*, size_t> live_;
  size_t live_bytes_ = 0, kept_bytes_ = 0, most_bytes_ = 0;

  // Room for a new block: what was given back longest ago goes first.
  void shrink(size_t size) {
    const size_t most = std::max(most_bytes_, live_bytes_ + size);
    while (!kept_.empty() && live_bytes_ + size + kept_bytes_ > most) drop_last();
  }
  void drop_last() {
    kept_bytes_ -= kept_.back().size;
    std::free(kept_.back().start);
    kept_.pop_back();
  }
  void drop_all() {
    while (!kept_.empty()) drop_last();
  }
  void report(void* p, int64_t size) const {
    if (c10::memoryProfilingEnabled())
      c10::reportMemoryUsageToProfiler(p, size, live_bytes_, live_bytes_ + kept_bytes_, c10::Device(c10::kCPU));
  }
};

Pool& pool() {
  static Pool* const instance = new Pool;  // never destroyed: tensors may outlive every static object
  return *instance;
}

// torch's CPU allocator with the pool in front of it for threads inside a PoolScope.
class PooledAllocator final : public c10::Allocator {
 public:
  explicit PooledAllocator(c10::Allocator* plain) : plain_(plain) {}
  c10::DataPtr allocate(size_t bytes) override {
    if (scopes == 0 || static_cast<int64_t>(bytes) < kPooledBytes) return plain_->allocate(bytes);
    void* const p = pool().take(bytes);
    return {p, p, &free_pooled, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_any; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

  static PooledAllocator* installed;

 private:
  c10::Allocator* const plain_;
  static void free_pooled(void* p) { pool().give_back(p); }
  static void free_any(void* p) {
    if (!pool().give_back(p)) installed->plain_->raw_deleter()(p);
  }
};
PooledAllocator* PooledAllocator::installed = nullptr;

// When the library is loaded, unless CONVBN_EXT_POOL=0.
[[maybe_unused]] const bool installs = [] {
  const char* setting = std::getenv("CONVBN_EXT_POOL");
  if (setting && std::string_view(setting) == "0") return false;
  PooledAllocator::installed = new PooledAllocator(c10::GetCPUAllocator());
  c10::SetCPUAllocator(PooledAllocator::installed);
  return true;
}();

}  // namespace

PoolScope::PoolScope() { ++scopes; }
PoolScope::~PoolScope() { --scopes; }
PoolPause::PoolPause(bool pauses) : scopes_(pauses ? std::exchange(scopes, 0) : 0) {}
PoolPause::~PoolPause() { scopes += scopes_; }

std::pair<int64_t, int64_t> pool_bytes() { return pool().bytes(); }
void pool_release() { pool().release(); }

}  // namespace convbn
