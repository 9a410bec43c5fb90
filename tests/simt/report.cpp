#include "report.h"

#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <map>

namespace simt {

Reports reports;

const std::string& source_line(const void* return_address) {
  static std::map<const void*, std::string> known;
  auto [entry, is_new] = known.try_emplace(return_address, "?");
  Dl_info module;
  const char* instruction = static_cast<const char*>(return_address) - 1;
  if (!is_new || !return_address || !dladdr(instruction, &module)) return entry->second;
  char command[4096], line[1024] = "";
  std::snprintf(command, sizeof command, "addr2line -s -e '%s' %#zx 2>/dev/null", module.dli_fname,
                static_cast<size_t>(instruction - static_cast<const char*>(module.dli_fbase)));
  if (FILE* pipe = popen(command, "r")) {
    if (std::fgets(line, sizeof line, pipe)) {
      line[std::strcspn(line, "\n ")] = 0;
      entry->second = line;
    }
    pclose(pipe);
  }
  return entry->second;
}

}  // namespace simt
