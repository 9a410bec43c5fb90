// Reports: each (kind, source line) once per launch, "kind|kernel|file:line|what happened".
#pragma once
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace simt {

// "file:line" of the instruction before a return address.
const std::string& source_line(const void* return_address);
void resolve_lines(const std::vector<const void*>& return_addresses);  // many at once are as fast as one

class Reports {
 public:
  // describe() builds the text, and is called only the first time.
  template <class Describe>
  void add(const char* kind, const char* kernel, const void* site, Describe describe) {
    if (!seen_.insert({kind, site}).second) return;
    lines_.push_back(std::string(kind) + "|" + kernel + "|" + source_line(site) + "|" + describe());
  }
  void begin_launch() { seen_.clear(); }
  std::string take() {
    std::string text;
    for (const auto& line : lines_) text += line + "\n";
    lines_.clear();
    return text;
  }

 private:
  std::set<std::pair<const char*, const void*>> seen_;
  std::vector<std::string> lines_;
};

extern Reports reports;

}  // namespace simt
