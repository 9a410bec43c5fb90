#include "api.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>

#include "engine.h"

namespace {

constexpr std::size_t kAlign = 256;  // what a device allocator promises
constexpr unsigned char kGuardByte = 0xa5;
#ifdef __SANITIZE_ADDRESS__
constexpr std::size_t kGuard = 0;  // the sanitizer's red zone has to begin at the last byte
#else
constexpr std::size_t kGuard = 4096;
#endif

struct Allocation {
  unsigned char* base;
  std::size_t before, bytes;

  bool intact() const {
    const auto untouched = [](const unsigned char* p, std::size_t n) {
      return std::all_of(p, p + n, [](unsigned char b) { return b == kGuardByte; });
    };
    return kGuard == 0 || (untouched(base, before) && untouched(base + before + bytes, kGuard));
  }
};

std::map<void*, Allocation> allocations;

}  // namespace

void simt_configure(int order, unsigned seed, unsigned preempt) {
  simt::schedule = {static_cast<simt::Schedule::Order>(order), seed, preempt};
}

void simt_blocks(std::uint64_t first, std::uint64_t count) { simt::chosen_blocks = {first, count}; }

void* simt_map(std::size_t bytes) {
  return mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}

void simt_unmap(void* address, std::size_t bytes) { munmap(address, bytes); }

void* simt_allocate(std::size_t bytes, std::size_t offset, const char* name, int read_only) {
  const std::size_t before = kGuard + offset;
  void* base = nullptr;
  if (posix_memalign(&base, kAlign, before + bytes + kGuard + (before + bytes + kGuard == 0))) return nullptr;
  const Allocation allocation{static_cast<unsigned char*>(base), before, bytes};
  std::memset(base, kGuardByte, before + bytes + kGuard);
  void* address = allocation.base + before;
  allocations[address] = allocation;
  simt::memory_add_buffer(address, bytes, name, read_only != 0);
  return address;
}

int simt_free(void* address) {
  const Allocation allocation = allocations.at(address);
  const bool intact = allocation.intact();
  simt::memory_remove_buffer(address);
  allocations.erase(address);
  std::free(allocation.base);
  return intact;
}

const char* simt_reports() {
  static std::string text;
  text = simt::reports.take();
  return text.c_str();
}

const char* simt_traffic() {
  static std::string text;
  text = simt::memory_traffic();
  return text.c_str();
}

const char* simt_footprints() {
  static std::string text;
  text = simt::memory_footprints();
  return text.c_str();
}
