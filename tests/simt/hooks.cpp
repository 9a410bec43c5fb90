// The functions that `-fsanitize=thread` calls at every memory access. libtsan is not linked: these take its place.
#include "engine.h"

#define SIMT_HOOK(bytes)                                                                                         \
  void __tsan_read##bytes(void* p) { simt::memory_access(p, bytes, false, false, __builtin_return_address(0)); } \
  void __tsan_write##bytes(void* p) { simt::memory_access(p, bytes, true, false, __builtin_return_address(0)); } \
  void __tsan_unaligned_read##bytes(void* p) {                                                                   \
    simt::memory_access(p, bytes, false, false, __builtin_return_address(0));                                    \
  }                                                                                                              \
  void __tsan_unaligned_write##bytes(void* p) {                                                                  \
    simt::memory_access(p, bytes, true, false, __builtin_return_address(0));                                     \
  }

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

SIMT_HOOK(1)
SIMT_HOOK(2)
SIMT_HOOK(4)
SIMT_HOOK(8)
SIMT_HOOK(16)

// Copies of odd sizes: as words and what is left.
void __tsan_read_range(void* p, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 4) {
    simt::memory_access(static_cast<char*>(p) + i, bytes - i < 4 ? bytes - i : 4, false, false,
                        __builtin_return_address(0));
  }
}
void __tsan_write_range(void* p, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 4) {
    simt::memory_access(static_cast<char*>(p) + i, bytes - i < 4 ? bytes - i : 4, true, false,
                        __builtin_return_address(0));
  }
}

}  // extern "C"
