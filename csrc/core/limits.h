// What bounds the default number of threads: the CPUs that this process may use, and what its user
// asked for.
#pragma once
#include <string>
#include <vector>

namespace tilewright {

struct ThreadLimit {
  const char* source;
  double cores;
};

// The CPUs of the affinity mask; then, each where there is one, the control groups' quota,
// OMP_NUM_THREADS and TILEWRIGHT_NUM_THREADS. The default is the least of them. `root`: as below.
std::vector<ThreadLimit> thread_limits(const std::string& root = "");

// Cores that the CPU quotas of this process's control group and of those above it allow, v2 or v1;
// 0 without a quota. `root` stands before /proc and /sys.
double cgroup_quota(const std::string& root = "");

}  // namespace tilewright
