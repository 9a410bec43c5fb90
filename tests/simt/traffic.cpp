#include "traffic.h"

#include <algorithm>

#include "engine.h"

namespace simt {

Traffic traffic;

namespace {

constexpr uintptr_t kSector = 32, kBank = 4, kBanks = 32;

// Distinct values of address / unit over all bytes of a request.
std::vector<uintptr_t> units_touched(const uintptr_t* address, unsigned count, unsigned bytes, uintptr_t unit) {
  std::vector<uintptr_t> units;
  units.reserve(count * (bytes / unit + 1));
  for (unsigned i = 0; i < count; ++i) {
    for (uintptr_t u = address[i] / unit; u <= (address[i] + bytes - 1) / unit; ++u) units.push_back(u);
  }
  std::sort(units.begin(), units.end());
  units.erase(std::unique(units.begin(), units.end()), units.end());
  return units;
}

// Words of one bank are fetched one after the other; the same word is broadcast.
uint64_t bank_passes(const std::vector<uintptr_t>& words) {
  std::array<uint64_t, kBanks> depth{};
  for (const uintptr_t word : words) ++depth[word % kBanks];
  return *std::max_element(depth.begin(), depth.end());
}

}  // namespace

void Traffic::begin_launch() {
  open_.clear();
  recent_.clear();
}

unsigned Traffic::instruction_of(const void* site, const std::string& region, bool shared, bool write) {
  // Within a launch the address of the region's name stands for the region: cheap to hash.
  const uint64_t key = reinterpret_cast<uint64_t>(site) * 2 + write + (reinterpret_cast<uint64_t>(&region) << 20);
  const auto [entry, is_new] = recent_.try_emplace(key, 0);
  if (!is_new) return entry->second;
  const std::string name = std::string(kernel_name) + "|" + std::to_string(reinterpret_cast<uint64_t>(site)) + "|" +
                           region + (write ? "|w" : "|r");
  const auto [number, unseen] = known_.try_emplace(name, instructions_.size());
  if (unseen) instructions_.push_back({kernel_name, region, site, shared, write});
  return entry->second = number->second;
}

void Traffic::add(const void* site, const std::string& region, bool shared, bool write, const char* address,
                  std::size_t bytes) {
  const unsigned instruction = instruction_of(site, region, shared, write);
  Lane& lane = *current;
  if (lane.occurrence.size() <= instruction) lane.occurrence.resize(instruction + 1);
  if (open_.size() <= lane.warp) open_.resize(lane.warp + 1);
  auto& by_instruction = open_[lane.warp];
  if (by_instruction.size() <= instruction) by_instruction.resize(instruction + 1);
  auto& requests = by_instruction[instruction];
  const unsigned occurrence = lane.occurrence[instruction]++;
  if (requests.size() <= occurrence) requests.resize(occurrence + 1);
  Request& request = requests[occurrence];
  request.bytes = bytes;
  request.lane[request.count] = lane.lane;
  request.address[request.count++] = reinterpret_cast<uintptr_t>(address);
}

void Traffic::count(Instruction& instruction, const Request& request) {
  ++instruction.requests;
  instruction.bytes += uint64_t{request.count} * request.bytes;
  if (!instruction.shared) {
    const auto touched = units_touched(request.address.data(), request.count, request.bytes, 1).size();
    instruction.moved += units_touched(request.address.data(), request.count, request.bytes, kSector).size();
    instruction.ideal += (touched + kSector - 1) / kSector;
    return;
  }
  // 8-byte accesses go by half warps, 16-byte ones by quarters; the ideal is one pass for each part that takes part.
  const unsigned lanes_at_once = kWarpLanes / std::max(1u, request.bytes / static_cast<unsigned>(kBank));
  for (unsigned part = 0; part < kWarpLanes / lanes_at_once; ++part) {
    std::array<uintptr_t, kWarpLanes> address;
    unsigned lanes = 0;
    for (unsigned i = 0; i < request.count; ++i) {
      if (request.lane[i] / lanes_at_once == part) address[lanes++] = request.address[i];
    }
    if (!lanes) continue;
    instruction.moved += bank_passes(units_touched(address.data(), lanes, request.bytes, kBank));
    ++instruction.ideal;
  }
}

void Traffic::end_window() {
  for (auto& by_instruction : open_) {
    for (std::size_t i = 0; i < by_instruction.size(); ++i) {
      for (const Request& request : by_instruction[i]) {
        if (request.count) count(instructions_[i], request);
      }
      by_instruction[i].clear();
    }
  }
  for (Lane& lane : block.lanes) lane.occurrence.clear();
}

std::string Traffic::take() {
  std::vector<const void*> sites;
  for (const Instruction& i : instructions_) sites.push_back(i.site);
  resolve_lines(sites);
  std::string text;
  for (const Instruction& i : instructions_) {
    text += i.kernel + "|" + source_line(i.site) + "|" + i.region + "|" + (i.shared ? "shared" : "global") + "|" +
            (i.write ? "write" : "read") + "|" + std::to_string(i.requests) + "|" + std::to_string(i.bytes) + "|" +
            std::to_string(i.moved) + "|" + std::to_string(i.ideal) + "\n";
  }
  instructions_.clear();
  known_.clear();
  begin_launch();
  return text;
}

}  // namespace simt
