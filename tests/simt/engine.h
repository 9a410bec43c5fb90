// The simulator's inside: lanes, the resident block, and what the engine tells the memory checker.
#pragma once
#include <array>
#include <cstddef>
#include <string>
#include <vector>

#include "fiber.h"
#include "report.h"
#include "simt.h"

namespace simt {

constexpr unsigned kWarpLanes = 32;
constexpr std::size_t kMaxSharedBytes = 227 << 10;  // a block's limit on sm_90; dynamic part

enum class State : uint8_t { ready, at_barrier, in_collective, done };

struct Lane {
  uint3 thread;
  unsigned linear, warp, lane;
  State state;
  Fiber fiber;
  const void* site;  // where it waits

  struct {
    Collective kind;
    unsigned mask, source;
    uint64_t value, result;
  } request;

  // Vector clock within the warp: what this lane has seen of lane i by __syncwarp. Shuffles and votes do not order
  // memory.
  unsigned time;
  std::array<unsigned, kWarpLanes> seen;
  std::vector<uint32_t> occurrence;  // per instruction: how often executed since the last barrier (traffic.cpp)

  unsigned exchanges;  // so far: their buffers alternate
  struct Copy {        // cp.async: the bytes as they were read, written when the lane waits for them
    char* shared;
    std::array<char, 16> bytes;
    unsigned group;
    const void* site;
  };
  std::vector<Copy> copies;
  unsigned copy_groups;  // committed
};

struct Block {
  uint3 index;
  unsigned linear, live, arrived;
  unsigned epoch;  // barriers passed
  int any, all, count;
  int published_any, published_all, published_count;
  std::vector<Lane> lanes;
};

struct Schedule {
  enum Order { ascending, descending, random } order = ascending;
  unsigned seed = 1;
  unsigned preempt = 0;  // instrumented build: yield at one in `preempt` memory accesses; 0 = never
};

struct ChosenBlocks {
  uint64_t first = 0, count = 0;  // 0: all
};

extern Schedule schedule;
extern ChosenBlocks chosen_blocks;
extern Block block;
extern Lane* current;      // null outside a kernel
extern unsigned launches;  // launches so far; numbers the current one
extern const char* kernel_name;

std::string describe(const Lane& lane);
void yield_lane();
[[noreturn]] void abandon_lane();  // after an error that it cannot survive

// Memory checker, instrumented build (memory.cpp); the other builds link no_memory.cpp, where these do nothing.
struct Span {
  const char* begin = nullptr;
  std::size_t bytes = 0;
  bool contains(const void* p) const { return p >= begin && p < begin + bytes; }
};
void memory_begin_launch(Span static_shared, Span dynamic_shared, std::size_t dynamic_bytes, Span arguments);
void memory_epoch();  // a barrier, or the end of a block
void memory_access(const void* address, std::size_t bytes, bool write, bool atomic, const void* site);
void memory_landing(const void* address, std::size_t bytes,
                    const void* site);  // of an asynchronous copy, counted before
void memory_add_buffer(const void* address, std::size_t bytes, const char* name, bool read_only);
void memory_remove_buffer(const void* address);
std::string memory_footprints();
std::string memory_traffic();  // one line per instruction, and forget it

}  // namespace simt
