#include "report.h"

#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <map>

namespace simt {

Reports reports;

namespace {

std::map<const void*, std::string> known_lines;

}  // namespace

void resolve_lines(const std::vector<const void*>& return_addresses) {
  std::vector<const void*> asked;
  std::string command;
  for (const void* address : return_addresses) {
    Dl_info module;
    const char* instruction = static_cast<const char*>(address) - 1;
    if (!known_lines.try_emplace(address, "?").second || !address || !dladdr(instruction, &module)) continue;
    char text[32];
    std::snprintf(text, sizeof text, " %#zx",
                  static_cast<size_t>(instruction - static_cast<const char*>(module.dli_fbase)));
    if (asked.empty()) command = std::string("addr2line -s -e '") + module.dli_fname + "'";
    command += text;
    asked.push_back(address);
  }
  if (asked.empty()) return;
  FILE* pipe = popen((command + " 2>/dev/null").c_str(), "r");
  char line[1024];
  for (const void* address : asked) {
    if (!pipe || !std::fgets(line, sizeof line, pipe)) break;
    line[std::strcspn(line, "\n ")] = 0;
    known_lines[address] = line;
  }
  if (pipe) pclose(pipe);
}

const std::string& source_line(const void* return_address) {
  resolve_lines({return_address});
  return known_lines[return_address];
}

}  // namespace simt
