// Threads, ISA levels and interruption: the switches of the process.
#pragma once
#include <string>
#include <vector>

namespace tilewright {

// Threads that kernels use. No result depends on it. Unless set: the least of the CPU affinity, the
// control groups' quota, OMP_NUM_THREADS and TILEWRIGHT_NUM_THREADS.
int num_threads();
void set_num_threads(int n);  // 1 to 1024, else ShapeError
int default_num_threads();

// Called by the process's first thread inside kernels, at most every 20 ms; non-zero stops the
// kernel, which then throws Interrupted. nullptr: none.
void set_poll(int (*poll)());

struct IsaLevel {
  const char* name;
  bool compiled, supported, active;
};
std::vector<IsaLevel> isa_levels();  // in ascending order
// Makes a level the active one; "" is the best that the CPU supports, TILEWRIGHT_ISA's value what
// is active at first. UnsupportedError where it is unknown or unsupported. A matrix packed at one
// level serves at that level only.
void set_isa(const std::string& name);

}  // namespace tilewright
