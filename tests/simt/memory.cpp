// Every memory access of an instrumented kernel: bounds, races, uninitialised shared memory; then its traffic
// (traffic.cpp).
//
// The shadow of a region keeps, per two bytes, the last writer and two readers. An access races with an earlier one of
// the same launch unless the same thread made it, or a barrier lies between (same block, earlier epoch), or a
// __syncwarp has carried it over (same warp, vector clock), or both are atomic. Blocks of one launch are never ordered.
#include <dlfcn.h>

#include <map>
#include <random>
#include <utility>
#include <vector>

#include "engine.h"
#include "traffic.h"

namespace simt {
namespace {

constexpr std::size_t kGranule = 2;  // bytes per shadow cell: the smallest scalar a kernel stores

struct Access {
  unsigned launch = 0, block, thread, epoch, time;
  const void* site;
  bool atomic;
};

struct Cell {
  Access write, read[2];
};

struct Region {
  std::string name;
  const char* begin = nullptr;
  std::size_t bytes = 0;
  bool shared = false, read_only = false;
  std::vector<Cell> shadow;
  std::vector<unsigned> touched[2] = {};  // per 32-byte sector: the last launch that read, wrote it

  bool contains(const char* p, std::size_t n) const { return p >= begin && p + n <= begin + bytes; }
};

constexpr std::size_t kSector = 32;

std::map<const char*, Region> buffers;
std::map<std::string, uint64_t> footprints;  // "kernel|buffer|read or write" → different sectors
Region static_region, dynamic_region;
Span dynamic_arena, argument_span;
std::mt19937 preemption;

Region shared_region(const char* name, const char* begin, std::size_t bytes) {
  return {name, begin, bytes, true, false, std::vector<Cell>((bytes + 2 * kGranule) / kGranule)};
}

bool is_module_data(const void* address) {  // constants of the library itself
  Dl_info module;
  return dladdr(address, &module) != 0;
}

Region* last_buffer;  // of this launch

Region* find_buffer(const char* address) {
  if (last_buffer && last_buffer->contains(address, 1)) return last_buffer;
  const auto next = buffers.upper_bound(address);
  if (next == buffers.begin()) return nullptr;
  return last_buffer = &std::prev(next)->second;
}

// The region of an access, null when the access needs no check; does not return when it is out of bounds.
Region* region_of(const char* address, std::size_t bytes, bool write, const void* site) {
  if (current->fiber.on_stack(address) || argument_span.contains(address)) return nullptr;
  if (static_region.bytes && static_region.contains(address, bytes)) return &static_region;
  if (dynamic_arena.contains(address)) {
    if (dynamic_region.contains(address, bytes)) return &dynamic_region;
    reports.add("out-of-bounds-shared", kernel_name, site, [&] {
      return describe(*current) + (write ? " writes" : " reads") + " byte " +
             std::to_string(address - dynamic_arena.begin) + " of " + std::to_string(dynamic_region.bytes) +
             " of dynamic shared memory";
    });
    abandon_lane();
  }
  Region* buffer = find_buffer(address);
  if (buffer && buffer->contains(address, bytes)) return buffer;
  if (is_module_data(address)) return nullptr;
  reports.add(write ? "out-of-bounds-write" : "out-of-bounds-read", kernel_name, site, [&] {
    const std::string where = buffer ? std::to_string(address - buffer->begin) + " bytes into " + buffer->name +
                                           ", which has " + std::to_string(buffer->bytes)
                                     : "in front of every buffer";
    return describe(*current) + " is " + where;
  });
  abandon_lane();
}

bool is_stale(const Access& earlier, bool shared) {  // of an earlier launch, or another block's shared memory
  return earlier.launch != launches || (shared && earlier.block != block.linear);
}

bool is_ordered(const Access& earlier, const Lane& lane) {
  if (earlier.block != block.linear) return false;
  if (earlier.thread == lane.linear || earlier.epoch < block.epoch) return true;
  return earlier.thread / kWarpLanes == lane.warp && lane.seen[earlier.thread % kWarpLanes] >= earlier.time;
}

void check_cell(Cell& cell, const Region& region, const Access& access, bool write) {
  const Lane& lane = *current;
  const auto races = [&](const Access& earlier) {
    return !is_stale(earlier, region.shared) && !(earlier.atomic && access.atomic) && !is_ordered(earlier, lane);
  };
  const auto report_race = [&](const Access& earlier, const char* earlier_verb) {
    reports.add("race", kernel_name, access.site, [&] {
      return describe(lane) + (write ? " writes " : " reads ") + region.name + " that thread #" +
             std::to_string(earlier.thread) + " of block #" + std::to_string(earlier.block) + earlier_verb +
             ", unsynchronised, at " + source_line(earlier.site);
    });
  };
  if (races(cell.write)) report_race(cell.write, " wrote");
  if (write) {
    for (const Access& read : cell.read) {
      if (races(read)) report_race(read, " read");
    }
    cell.write = access;
    return;
  }
  if (region.shared && is_stale(cell.write, true)) {
    reports.add("uninitialised-shared", kernel_name, access.site,
                [&] { return describe(lane) + " reads shared memory that nobody has written"; });
  }
  const bool replaces = is_stale(cell.read[0], region.shared) || is_ordered(cell.read[0], lane);
  cell.read[replaces ? 0 : 1] = access;  // two unordered readers are enough to catch a later unordered writer
}

void check_cells(Region& region, const char* address, std::size_t bytes, bool write, bool atomic, const void* site) {
  const Access access{launches, block.linear, current->linear, block.epoch, current->time, site, atomic};
  const uintptr_t base = reinterpret_cast<uintptr_t>(region.begin) / kGranule;
  const uintptr_t first = reinterpret_cast<uintptr_t>(address) / kGranule;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(address) + bytes - 1) / kGranule;
  for (uintptr_t granule = first; granule <= last; ++granule)
    check_cell(region.shadow[granule - base], region, access, write);
}

void add_to_footprint(Region& region, const char* address, std::size_t bytes, bool write) {
  auto& touched = region.touched[write];
  const uintptr_t base = reinterpret_cast<uintptr_t>(region.begin) / kSector;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(address) + bytes - 1) / kSector;
  for (uintptr_t sector = reinterpret_cast<uintptr_t>(address) / kSector; sector <= last; ++sector) {
    if (std::exchange(touched[sector - base], launches) == launches) continue;
    ++footprints[std::string(kernel_name) + "|" + region.name + (write ? "|write" : "|read")];
  }
}

}  // namespace

void memory_begin_launch(Span static_shared, Span arena, std::size_t dynamic_bytes, Span arguments) {
  if (static_region.begin != static_shared.begin || static_region.bytes != static_shared.bytes) {
    static_region = shared_region("shared", static_shared.begin, static_shared.bytes);
  }
  if (dynamic_region.begin != arena.begin || dynamic_region.bytes != dynamic_bytes) {
    dynamic_region = shared_region("shared", arena.begin, dynamic_bytes);
  }
  dynamic_arena = arena;
  last_buffer = nullptr;
  argument_span = arguments;
  preemption.seed(schedule.seed);
  traffic.begin_launch();
}

void memory_epoch() { traffic.end_window(); }

void memory_access(const void* pointer, std::size_t bytes, bool write, bool atomic, const void* site) {
  if (!current) return;
  const char* address = static_cast<const char*>(pointer);
  Region* region = region_of(address, bytes, write, site);
  if (!region) return;
  Lane& lane = *current;
  if (write && region->read_only) {
    reports.add("write-to-read-only", kernel_name, site, [&] { return describe(lane) + " writes " + region->name; });
  }
  if (reinterpret_cast<uintptr_t>(address) % bytes) {
    reports.add("misaligned", kernel_name, site,
                [&] { return describe(lane) + ", " + std::to_string(bytes) + " bytes of " + region->name; });
  }
  if (!region->shared) add_to_footprint(*region, address, bytes, write);
  traffic.add(site, region->name, region->shared, write, address, bytes);
  check_cells(*region, address, bytes, write, atomic, site);
  if (schedule.preempt && preemption() % schedule.preempt == 0) yield_lane();
}

void memory_landing(const void* pointer, std::size_t bytes, const void* site) {
  const char* address = static_cast<const char*>(pointer);
  if (Region* region = region_of(address, bytes, true, site)) check_cells(*region, address, bytes, true, false, site);
}

void memory_add_buffer(const void* address, std::size_t bytes, const char* name, bool read_only) {
  const char* begin = static_cast<const char*>(address);
  Region& region =
      buffers[begin] = {name, begin, bytes, false, read_only, std::vector<Cell>((bytes + 2 * kGranule) / kGranule)};
  for (auto& sectors : region.touched) sectors.resize(bytes / kSector + 2);
}

void memory_remove_buffer(const void* address) { buffers.erase(static_cast<const char*>(address)); }

std::string memory_traffic() { return traffic.take(); }

std::string memory_footprints() {
  std::string text;
  for (const auto& [what, sectors] : std::exchange(footprints, {})) text += what + "|" + std::to_string(sectors) + "\n";
  return text;
}

}  // namespace simt
