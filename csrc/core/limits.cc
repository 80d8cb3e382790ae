#include "core/limits.h"

#include <sched.h>

#include <cstdlib>
#include <fstream>
#include <thread>

#include "core/env.h"

namespace tilewright {
namespace {

// The number before `end`; 0 for another word. Not by `>>`: that asks the locale for its way to read
// numbers, and inside of Python the one of a libstdc++ that is linked in statically has none.
double next_number(std::istream& file, char end = '\n') {
  std::string word;
  std::getline(file, word, end);
  return std::strtod(word.c_str(), nullptr);
}

// cpu.max of v2 is "max 100000" or "200000 100000"; v1 has a file for each number, and -1 for none.
double quota_of(const std::string& group) {
  double quota = 0, period = 0;
  if (std::ifstream v2(group + "/cpu.max"); v2) {
    quota = next_number(v2, ' '), period = next_number(v2);
  } else {
    std::ifstream quotas(group + "/cpu.cfs_quota_us"), periods(group + "/cpu.cfs_period_us");
    quota = next_number(quotas), period = next_number(periods);
  }
  return quota > 0 && period > 0 ? quota / period : 0;
}

// `controllers`, "cpu,cpuacct", has the CPU's.
bool has_cpu(const std::string& controllers) {
  return ("," + controllers + ",").find(",cpu,") != std::string::npos;
}

// Machines of more than CPU_SETSIZE CPUs need a larger mask, which the standard library asks for.
int cpus_of_affinity() {
  cpu_set_t set;
  const int cpus = sched_getaffinity(0, sizeof set, &set) == 0
                       ? CPU_COUNT(&set)
                       : int(std::thread::hardware_concurrency());
  return cpus > 0 ? cpus : 1;
}

}  // namespace

double cgroup_quota(const std::string& root) {
  double least = 0;
  std::ifstream groups(root +
                       "/proc/self/cgroup");  // lines "number:controllers:path", v2 "0::path"
  for (std::string line; std::getline(groups, line);) {
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    if (!controllers.empty() && !has_cpu(controllers)) continue;
    const std::string mount =
        root + (controllers.empty() ? "/sys/fs/cgroup" : "/sys/fs/cgroup/cpu");
    // A container may see its host's path here, but have its own group mounted at the root.
    for (std::string path = line.substr(second + 1);; path.erase(path.rfind('/'))) {
      const double quota = quota_of(mount + path);
      if (quota > 0 && (least == 0 || quota < least)) least = quota;
      if (path.find('/') == std::string::npos) break;
    }
  }
  return least;
}

std::vector<ThreadLimit> thread_limits(const std::string& root) {
  std::vector<ThreadLimit> limits = {{"affinity", double(cpus_of_affinity())}};
  const auto add = [&](const char* source, double cores) {
    if (cores > 0) limits.push_back({source, cores});
  };
  add("cgroup quota", cgroup_quota(root));
  for (const char* variable : {"OMP_NUM_THREADS", "TILEWRIGHT_NUM_THREADS"}) {
    add(variable, double(env::get_int(variable, 0)));
  }
  return limits;
}

}  // namespace tilewright
