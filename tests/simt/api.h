// What Python calls (harness.py, by ctypes).
#pragma once
#include <cstddef>
#include <cstdint>

#define SIMT_API extern "C" __attribute__((visibility("default")))

SIMT_API void simt_configure(int order, unsigned seed, unsigned preempt);

// Launches run the blocks [first, first + count) of their grids alone; count = 0: all again.
SIMT_API void simt_blocks(std::uint64_t first, std::uint64_t count);

// Zeros without memory behind them until they are written, for tensors larger than the machine; unchecked.
SIMT_API void* simt_map(std::size_t bytes);
SIMT_API void simt_unmap(void* address, std::size_t bytes);

// Device memory for a tensor of `bytes`, starting `offset` bytes behind a 256-byte boundary, with guard zones around
// it.
SIMT_API void* simt_allocate(std::size_t bytes, std::size_t offset, const char* name, int read_only);
SIMT_API int simt_free(void* address);  // 1 when the guard zones are intact

// The text since the last call; valid until the next.
SIMT_API const char* simt_reports();
SIMT_API const char* simt_traffic();
SIMT_API const char* simt_footprints();
