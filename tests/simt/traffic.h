// What a warp asks of memory at once: 32-byte sectors of global memory, passes over the 32 banks of shared memory.
//
// The accesses of one instruction by the lanes of one warp belong to one request when each lane executes it for the
// n-th time since the last barrier. After divergence this pairing can be off; on loops that all lanes of a warp run
// alike it is exact.
#pragma once
#include <array>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

namespace simt {

class Traffic {
 public:
  void begin_launch();
  void add(const void* site, const std::string& region, bool shared, bool write, const char* address,
           std::size_t bytes);
  void end_window();   // a barrier or the end of a block: count the open requests
  std::string take();  // "kernel|file:line|region|shared|write|requests|bytes|moved|ideal" per instruction and region

 private:
  struct Request {
    std::array<uintptr_t, 32> address;
    std::array<uint8_t, 32> lane;
    unsigned count = 0, bytes = 0;
  };
  struct Instruction {
    std::string kernel, region;
    const void* site;
    bool shared, write;
    uint64_t requests = 0, bytes = 0, moved = 0, ideal = 0;
  };

  unsigned instruction_of(const void* site, const std::string& region, bool shared, bool write);
  void count(Instruction& instruction, const Request& request);

  std::vector<Instruction> instructions_;
  std::unordered_map<std::string, unsigned> known_;
  std::unordered_map<uint64_t, unsigned> recent_;
  std::vector<std::vector<std::vector<Request>>> open_;  // [warp][instruction][occurrence]
};

extern Traffic traffic;

}  // namespace simt
