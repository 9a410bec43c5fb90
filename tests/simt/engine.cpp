// Runs a grid: block after block, each block's threads as fibers, in a chosen order.
//
// A lane runs until it waits (barrier, warp collective), is preempted, or ends. A barrier opens when every lane that
// has not exited has arrived; a collective when every lane of its mask has. When nothing can run and lanes remain, they
// are deadlocked.
#include "engine.h"

#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <random>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace simt {

Schedule schedule;
ChosenBlocks chosen_blocks;
Block block;
Lane* current;
unsigned launches;
const char* kernel_name = "";

namespace {

constexpr unsigned kMaxThreads = 1024;
constexpr std::size_t kArenaBytes =
    512 << 10;  // dynamic shared memory and, behind the launch's share, a zone nobody may touch
constexpr unsigned char kPoison = 0xff;  // NaN in every floating type

dim3 grid_dim, block_dim;
Body kernel_body;
void* kernel_arguments;
std::mt19937 generator;
cudaError_t last_error = cudaSuccess;

char* map_memory(std::size_t bytes) {
  return static_cast<char*>(
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
}

char* stack_of(unsigned thread) {
  static char* const stacks = [] {
    char* memory = map_memory(kMaxThreads * Fiber::kStackBytes);
    for (unsigned i = 0; i < kMaxThreads; ++i) mprotect(memory + i * Fiber::kStackBytes, Fiber::kGuardBytes, PROT_NONE);
    return memory;
  }();
  return stacks + thread * Fiber::kStackBytes;
}

char* arena() {
  static char* const memory = map_memory(kArenaBytes);
  return memory;
}

// The TLS image of the library that holds `address`: its __shared__ variables.
[[maybe_unused]] Span find_static_shared(const void* address) {
  struct Search {
    const void* address;
    Span found;
  } search{address, {}};
  dl_iterate_phdr(
      [](dl_phdr_info* module, size_t, void* argument) {
        auto* wanted = static_cast<Search*>(argument);
        bool mine = false;
        Span tls;
        for (int i = 0; i < module->dlpi_phnum; ++i) {
          const auto& header = module->dlpi_phdr[i];
          const auto* begin = reinterpret_cast<const char*>(module->dlpi_addr + header.p_vaddr);
          if (header.p_type == PT_LOAD && Span{begin, header.p_memsz}.contains(wanted->address)) mine = true;
          if (header.p_type == PT_TLS) tls = {static_cast<const char*>(module->dlpi_tls_data), header.p_memsz};
        }
        if (mine) wanted->found = tls;
        return mine ? 1 : 0;
      },
      &search);
  return search.found;
}

template <class Describe>
void report(const char* kind, const void* site, Describe describe) {
  reports.add(kind, kernel_name, site, describe);
}

void wait_at(State state, const void* site) {
  current->state = state;
  current->site = site;
  Fiber::suspend();
}

#ifdef __SANITIZE_ADDRESS__
[[maybe_unused]] const bool listening = [] {  // what the address sanitizer finds is a report like any other
  __asan_set_error_report_callback([](const char* text) {
    const std::string report_text = text;
    const auto begin = report_text.find("ERROR: ");
    report("address-sanitizer", nullptr,
           [&] { return report_text.substr(begin, report_text.find('\n', begin) - begin); });
  });
  return true;
}();
#endif

bool same_line(const void* a, const void* b) { return a == b || source_line(a) == source_line(b); }

void open_barrier() {
  const void* first = nullptr;
  for (Lane& lane : block.lanes) {
    if (lane.state != State::at_barrier) continue;
    if (!first) first = lane.site;
    if (!same_line(first, lane.site)) {  // compilers may duplicate one source barrier, so lines are compared
      report("divergent-barrier", lane.site,
             [&] { return describe(lane) + " is at another barrier than " + source_line(first); });
    }
    lane.state = State::ready;
  }
  block.published_any = block.any;
  block.published_all = block.all;
  block.published_count = block.count;
  block.arrived = block.any = block.count = 0;
  block.all = 1;
  ++block.epoch;
  memory_epoch();
}

Lane* warp_of(const Lane& lane) { return &block.lanes[lane.warp * kWarpLanes]; }
unsigned lanes_in_warp(const Lane& lane) {
  return std::min<unsigned>(kWarpLanes, block.lanes.size() - lane.warp * kWarpLanes);
}

// The lanes of `mask` have met: exchange values, join clocks, release them.
void complete_collective(Lane* warp, unsigned lanes, unsigned mask) {
  uint64_t ballot = 0;
  const Lane* first = nullptr;
  std::array<unsigned, kWarpLanes> joined{};
  for (unsigned i = 0; i < lanes; ++i) {
    Lane& lane = warp[i];
    if (!(mask >> i & 1) || lane.state != State::in_collective) continue;
    if (!first) first = &lane;
    if (lane.request.kind != first->request.kind || !same_line(lane.site, first->site)) {
      report("divergent-collective", lane.site,
             [&] { return describe(lane) + " is in another collective than " + source_line(first->site); });
    }
    ballot |= (lane.request.value & 1) << i;
    lane.seen[i] = lane.time;
    for (unsigned j = 0; j < kWarpLanes; ++j) joined[j] = std::max(joined[j], lane.seen[j]);
  }
  for (unsigned i = 0; i < lanes; ++i) {
    Lane& lane = warp[i];
    if (!(mask >> i & 1) || lane.state != State::in_collective) continue;
    auto& request = lane.request;
    request.result = ballot;
    if (request.kind == Collective::shuffle) {
      const unsigned source = request.source;
      const bool active = source < lanes && mask >> source & 1 && warp[source].state != State::done;
      if (active) {
        request.result = warp[source].request.value;
      } else {
        request.result = ~uint64_t{0};
        report("inactive-source", lane.site,
               [&] { return describe(lane) + " shuffles from a lane that takes no part"; });
      }
    } else if (request.kind == Collective::sync) {
      lane.seen = joined;
      ++lane.time;
    }
  }
  for (unsigned i = 0; i < lanes; ++i) {
    if (mask >> i & 1 && warp[i].state == State::in_collective) warp[i].state = State::ready;
  }
}

// Complete the collective that `lane` waits in, if everybody of its mask is there.
bool try_collective(Lane& lane) {
  Lane* warp = warp_of(lane);
  const unsigned lanes = lanes_in_warp(lane), mask = lane.request.mask;
  for (unsigned i = 0; i < lanes; ++i) {
    if (!(mask >> i & 1)) continue;
    const bool present = warp[i].state == State::in_collective && warp[i].request.mask == mask;
    if (warp[i].state == State::done) {
      report("exited-lane", lane.site, [&] { return describe(warp[i]) + " has exited, but the mask names it"; });
    } else if (!present) {
      return false;
    }
  }
  complete_collective(warp, lanes, mask);
  return true;
}

void lane_exits() {
  Lane& lane = *current;
  lane.state = State::done;
  --block.live;
  Lane* warp = warp_of(lane);
  for (unsigned i = 0; i < lanes_in_warp(lane); ++i) {
    if (warp[i].state == State::in_collective && warp[i].request.mask >> lane.lane & 1) try_collective(warp[i]);
  }
}

void run_lane() {
  kernel_body(kernel_arguments);
  if (const auto& copies = current->copies; !copies.empty()) {
    report("unawaited-copy", copies[0].site,
           [] { return describe(*current) + " ends without waiting for an asynchronous copy"; });
  }
  lane_exits();
}

void prepare_block(unsigned linear) {
  const unsigned threads = block_dim.x * block_dim.y * block_dim.z;
  block.index = {linear % grid_dim.x, linear / grid_dim.x % grid_dim.y, linear / (grid_dim.x * grid_dim.y)};
  block.linear = linear;
  block.live = threads;
  block.arrived = block.epoch = 0;
  block.any = block.count = 0;
  block.all = 1;
  block.lanes.resize(threads);
  for (unsigned i = 0; i < threads; ++i) {
    Lane& lane = block.lanes[i];
    lane.thread = {i % block_dim.x, i / block_dim.x % block_dim.y, i / (block_dim.x * block_dim.y)};
    lane.linear = i;
    lane.warp = i / kWarpLanes;
    lane.lane = i % kWarpLanes;
    lane.state = State::ready;
    lane.time = 1;
    lane.seen.fill(0);
    lane.occurrence.clear();
    lane.exchanges = lane.copy_groups = 0;
    lane.copies.clear();
    lane.fiber.prepare(stack_of(i), run_lane);
  }
}

bool run_ready_lanes(std::vector<unsigned>& order) {
  bool ran = false;
  if (schedule.order == Schedule::random) std::shuffle(order.begin(), order.end(), generator);
  for (const unsigned i : order) {
    Lane& lane = block.lanes[i];
    if (lane.state == State::ready) {
      ran = true;
      current = &lane;
      lane.fiber.resume();
      current = nullptr;
    }
    if (block.arrived && block.arrived == block.live) open_barrier();
  }
  return ran;
}

void report_deadlock() {
  std::map<std::string, unsigned> waiting;
  const void* site = nullptr;
  for (const Lane& lane : block.lanes) {
    if (lane.state == State::done) continue;
    site = lane.site;
    ++waiting[(lane.state == State::at_barrier ? "at the barrier " : "in the collective ") + source_line(lane.site)];
  }
  report("deadlock", site, [&] {
    std::string text;
    for (const auto& [where, lanes] : waiting) text += std::to_string(lanes) + " lanes " + where + "; ";
    return text + std::to_string(block.lanes.size() - block.live) + " lanes exited";
  });
}

std::vector<unsigned> order_of(unsigned count) {
  std::vector<unsigned> order(count);
  for (unsigned i = 0; i < count; ++i) order[i] = schedule.order == Schedule::descending ? count - 1 - i : i;
  if (schedule.order == Schedule::random) std::shuffle(order.begin(), order.end(), generator);
  return order;
}

}  // namespace

std::string describe(const Lane& lane) {
  const auto text = [](uint3 i) {
    return "(" + std::to_string(i.x) + "," + std::to_string(i.y) + "," + std::to_string(i.z) + ")";
  };
  return "thread " + text(lane.thread) + " of block " + text(block.index);
}

void yield_lane() { Fiber::suspend(); }

void abandon_lane() {
  lane_exits();
  Fiber::finish();
}

uint3 thread_index() { return current->thread; }
uint3 block_index() { return block.index; }
dim3 block_size() { return block_dim; }
dim3 grid_size() { return grid_dim; }
unsigned lane_index() { return current->lane; }
void* dynamic_shared() { return arena(); }

int barrier(int predicate, Vote vote, const void* site) {
  block.any |= predicate != 0;
  block.all &= predicate != 0;
  block.count += predicate != 0;
  ++block.arrived;
  wait_at(State::at_barrier, site);
  return vote == Vote::any ? block.published_any : vote == Vote::all ? block.published_all : block.published_count;
}

uint64_t collective(Collective kind, unsigned mask, uint64_t value, unsigned source, const void* site) {
  Lane& lane = *current;
  if (!(mask >> lane.lane & 1)) {
    report("lane-not-in-mask", site, [&] { return describe(lane) + " is not in the mask it passes"; });
    return value;
  }
  lane.request = {kind, mask, source, value, 0};
  lane.state = State::in_collective;
  lane.site = site;
  if (!try_collective(lane)) Fiber::suspend();
  return lane.request.result;
}

void note_atomic(const void* address, size_t bytes, const void* site) {
  memory_access(address, bytes, true, true, site);
}

// The copy may land at any time up to the wait: here it lands then, so that whoever reads too early reads poison. The
// checker sees a write at both ends.
void copy_async(void* shared, const void* global, bool valid, const void* site) {
  Lane::Copy copy{static_cast<char*>(shared), {}, current->copy_groups, site};
  if (valid) {
    memory_access(global, copy.bytes.size(), false, false, site);
    std::memcpy(copy.bytes.data(), global, copy.bytes.size());
  }
  memory_access(shared, copy.bytes.size(), true, false, site);
  current->copies.push_back(copy);
}

void copy_commit() { ++current->copy_groups; }

void copy_wait(unsigned pending) {
  auto& copies = current->copies;
  const auto lands = [&](const Lane::Copy& copy) { return copy.group + pending < current->copy_groups; };
  for (const Lane::Copy& copy : copies) {
    if (!lands(copy)) continue;
    memory_landing(copy.shared, copy.bytes.size(), copy.site);
    std::memcpy(copy.shared, copy.bytes.data(), copy.bytes.size());
  }
  copies.erase(std::remove_if(copies.begin(), copies.end(), lands), copies.end());
}

void launch(const char* kernel, dim3 grid, dim3 threads, size_t shared_bytes, Body body, void* arguments,
            size_t bytes) {
  kernel_name = kernel;
  ++launches;
  reports.begin_launch();
  const uint64_t per_block = uint64_t{threads.x} * threads.y * threads.z, blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (per_block == 0 || per_block > kMaxThreads || blocks == 0 || grid.x > 0x7fffffff || grid.y > 65535 ||
      grid.z > 65535 || threads.z > 64 || shared_bytes > kMaxSharedBytes) {
    last_error = cudaErrorInvalidConfiguration;
    report("bad-launch", nullptr,
           [] { return std::string("the grid, the block or the shared memory is not allowed"); });
    return;
  }
  grid_dim = grid;
  block_dim = threads;
  kernel_body = body;
  kernel_arguments = arguments;
  generator.seed(schedule.seed);
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(arena(), shared_bytes);
  __asan_poison_memory_region(arena() + shared_bytes, kArenaBytes - shared_bytes);
  const Span static_shared;
#else
  const Span static_shared = find_static_shared(__builtin_return_address(0));
#endif
  memory_begin_launch(static_shared, {arena(), kArenaBytes}, shared_bytes, {static_cast<char*>(arguments), bytes});
  const std::vector<unsigned> blocks_in_order = order_of(chosen_blocks.count ? chosen_blocks.count : blocks);
  std::vector<unsigned> lanes_in_order = order_of(per_block);
  for (const unsigned linear : blocks_in_order) {
    prepare_block(static_cast<unsigned>(chosen_blocks.first) + linear);
    std::memset(arena(), kPoison, shared_bytes);
    if (static_shared.bytes) std::memset(const_cast<char*>(static_shared.begin), kPoison, static_shared.bytes);
    while (block.live) {
      if (!run_ready_lanes(lanes_in_order)) {
        report_deadlock();
        break;
      }
    }
    memory_epoch();
  }
}

}  // namespace simt

cudaError_t cudaGetLastError() { return std::exchange(simt::last_error, cudaSuccess); }
