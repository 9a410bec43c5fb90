// What Python calls (harness.py, by ctypes).
#pragma once
#include <cstddef>

#define SIMT_API extern "C" __attribute__((visibility("default")))

SIMT_API void simt_configure(int order, unsigned seed, unsigned preempt);

// Device memory for a tensor of `bytes`, starting `offset` bytes behind a 256-byte boundary, with guard zones around
// it.
SIMT_API void* simt_allocate(std::size_t bytes, std::size_t offset, const char* name, int read_only);
SIMT_API int simt_free(void* address);  // 1 when the guard zones are intact

// The text since the last call; valid until the next.
SIMT_API const char* simt_reports();
SIMT_API const char* simt_traffic();
