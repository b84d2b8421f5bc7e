#include "platform/system.h"

#include <sched.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <limits>
#include <optional>
#include <set>
#include <sstream>
#include <utility>
#include <vector>

namespace puna {

namespace {

std::optional<int64_t> number_in(const std::string& path) {
  std::ifstream file(path);
  int64_t value = 0;
  if (file >> value) return value;  // "max" in a cgroup file: no limit
  return std::nullopt;
}

// The number after `key` at the beginning of a line.
std::optional<int64_t> field_in(const std::string& path, const std::string& key) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    if (line.compare(0, key.size(), key) != 0) continue;
    std::istringstream rest(line.substr(key.size()));
    int64_t value = 0;
    if (rest >> value) return value;
  }
  return std::nullopt;
}

// Directories of this process's cgroup, from its own up to the root: a limit may sit on any of
// them.
std::vector<std::string> cgroup_directories(const std::string& mount,
                                            const std::string& controller) {
  std::string path = "/";
  std::ifstream file("/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {
    // "0::/path" (version 2) or "4:memory:/path" (version 1)
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const bool matches =
        controller.empty()
            ? controllers.empty()
            : ("," + controllers + ",").find("," + controller + ",") != std::string::npos;
    if (matches) path = line.substr(second + 1);
  }
  std::vector<std::string> directories;
  for (;; path = path.substr(0, path.rfind('/'))) {
    directories.push_back(mount + (path == "/" ? "" : path));
    if (path.empty() || path == "/") break;
  }
  return directories;
}

// What the cgroup leaves of the machine's memory.
struct MemoryLimit {
  int64_t total = std::numeric_limits<int64_t>::max();
  int64_t available = std::numeric_limits<int64_t>::max();
};

MemoryLimit memory_limit() {
  MemoryLimit limit;
  const auto consider = [&](const std::string& directory, const char* bytes_file,
                            const char* usage_file, const std::string& prefix) {
    const auto bytes = number_in(directory + bytes_file), used = number_in(directory + usage_file);
    if (!bytes || !used) return;
    // Usage counts the page cache, which yields where memory is needed: model files that were read
    // are no reason to call the memory full.
    const std::string statistics = directory + "/memory.stat";
    const int64_t cache = field_in(statistics, prefix + "active_file ").value_or(0) +
                          field_in(statistics, prefix + "inactive_file ").value_or(0);
    limit.total = std::min(limit.total, *bytes);
    limit.available = std::min(limit.available, *bytes - std::max<int64_t>(0, *used - cache));
  };
  for (const std::string& directory : cgroup_directories("/sys/fs/cgroup", "")) {
    consider(directory, "/memory.max", "/memory.current", "");
  }
  for (const std::string& directory : cgroup_directories("/sys/fs/cgroup/memory", "memory")) {
    consider(directory, "/memory.limit_in_bytes", "/memory.usage_in_bytes", "total_");
  }
  return limit;
}

// Processors' worth of time that the cgroup grants.
double cpu_quota() {
  double quota = std::numeric_limits<double>::infinity();
  for (const std::string& directory : cgroup_directories("/sys/fs/cgroup", "")) {
    std::ifstream file(directory + "/cpu.max");
    double allowed = 0, period = 0;
    if (file >> allowed >> period && period > 0) quota = std::min(quota, allowed / period);
  }
  for (const std::string& directory : cgroup_directories("/sys/fs/cgroup/cpu", "cpu")) {
    const auto allowed = number_in(directory + "/cpu.cfs_quota_us");
    const auto period = number_in(directory + "/cpu.cfs_period_us");
    if (allowed && period && *allowed > 0 && *period > 0) {
      quota = std::min(quota, static_cast<double>(*allowed) / static_cast<double>(*period));
    }
  }
  return quota;
}

}  // namespace

std::string processor_name() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    const size_t colon = line.find(": ");
    if (line.rfind("model name", 0) == 0 && colon != std::string::npos)
      return line.substr(colon + 2);
  }
  utsname system{};  // Arm's /proc/cpuinfo has numbers only
  return uname(&system) == 0 ? std::string(system.machine) + " processor" : "unknown processor";
}

int usable_cores() {
  cpu_set_t mask;
  CPU_ZERO(&mask);
  std::set<std::pair<int64_t, int64_t>> cores;  // (package, core): hyperthreads share one
  if (sched_getaffinity(0, sizeof mask, &mask) == 0) {
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
      if (!CPU_ISSET(cpu, &mask)) continue;
      const std::string topology =
          "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/";
      const auto package = number_in(topology + "physical_package_id");
      const auto core = number_in(topology + "core_id");
      cores.insert({package.value_or(0), core.value_or(cpu)});
    }
  } else {  // more processors than cpu_set_t holds
    for (int cpu = 0; cpu < sysconf(_SC_NPROCESSORS_ONLN); ++cpu) cores.insert({0, cpu});
  }
  const double quota = std::max(1.0, std::floor(cpu_quota()));
  return std::max(1, static_cast<int>(std::min(quota, static_cast<double>(cores.size()))));
}

int64_t total_memory_bytes() {
  const int64_t machine = field_in("/proc/meminfo", "MemTotal:").value_or(0) * 1024;
  return std::min(machine, memory_limit().total);
}

int64_t available_memory_bytes() {
  const int64_t machine = field_in("/proc/meminfo", "MemAvailable:").value_or(0) * 1024;
  return std::max<int64_t>(0, std::min(machine, memory_limit().available));
}

int64_t peak_resident_bytes() { return field_in("/proc/self/status", "VmHWM:").value_or(0) * 1024; }

}  // namespace puna
