#include "backend/cpu/cpu_memory.h"

#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <limits>
#include <optional>
#include <string>

namespace based::cpu {

namespace {

constexpr std::size_t kNoLimit = std::numeric_limits<std::size_t>::max();

// The number in a file; nothing for "max" or no file.
std::optional<std::size_t> read_number(const std::filesystem::path& path) {
  std::size_t number = 0;
  if (!(std::ifstream(path) >> number)) return std::nullopt;
  return number;
}

// The number behind `key` in a file of lines "key number …".
std::optional<std::size_t> read_entry(const std::filesystem::path& path, const std::string& key) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);)
    if (line.starts_with(key)) {
      const auto at = line.find_first_of("0123456789", key.size());
      if (at == std::string::npos) return std::nullopt;
      return std::stoull(line.substr(at));
    }
  return std::nullopt;
}

// Limit less use, where a page of a file that was not used lately counts as free.
std::size_t left(std::optional<std::size_t> limit, std::optional<std::size_t> used, std::optional<std::size_t> idle) {
  if (!limit || !used) return kNoLimit;
  const std::size_t kept = *used - std::min(*used, idle.value_or(0));
  return *limit - std::min(*limit, kept);
}

// Of this process's control groups and their ancestors, the least.
std::size_t left_in_cgroups(const std::filesystem::path& root) {
  std::size_t least = kNoLimit;
  std::ifstream groups(root / "proc/self/cgroup");  // lines "id:controllers:path"
  for (std::string line; std::getline(groups, line);) {
    const auto first = line.find(':');
    const auto second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    std::string controllers(1, ',');
    controllers.append(line, first + 1, second - first - 1).push_back(',');
    const bool v2 = controllers == ",,";
    if (!v2 && controllers.find(",memory,") == std::string::npos) continue;
    const std::filesystem::path top = root / (v2 ? "sys/fs/cgroup" : "sys/fs/cgroup/memory");
    // In a container the path may be the host's: what is not there is skipped, and the top is looked at last.
    for (std::string path = line.substr(second + 1);; path.resize(path.rfind('/'))) {
      if (path == "/") path.clear();
      const std::filesystem::path group = top.string() + path;
      least = std::min(
          least, v2 ? left(read_number(group / "memory.max"), read_number(group / "memory.current"),
                           read_entry(group / "memory.stat", "inactive_file "))
                    : left(read_number(group / "memory.limit_in_bytes"), read_number(group / "memory.usage_in_bytes"),
                           read_entry(group / "memory.stat", "total_inactive_file ")));
      if (path.find('/') == std::string::npos) break;
    }
  }
  return least;
}

// Of the machine.
std::size_t all_memory() {
  const long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);
  return pages > 0 && page > 0 ? static_cast<std::size_t>(pages) * static_cast<std::size_t>(page) : kNoLimit;
}

}  // namespace

std::size_t available_memory(const std::filesystem::path& root) {
  const auto kilobytes = read_entry(root / "proc/meminfo", "MemAvailable:");
  const std::size_t machine = kilobytes && *kilobytes < kNoLimit / 1024 ? *kilobytes * 1024 : all_memory();
  return std::min(machine, left_in_cgroups(root));
}

}  // namespace based::cpu
