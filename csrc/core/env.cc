#include "core/env.h"

#include <cstdlib>

namespace tilewright::env {

const std::vector<Variable>& variables() {
  static const std::vector<Variable> table = {
      {"TILEWRIGHT_ISA", "force an ISA level: a name that tw.isas() lists"},
      {"TILEWRIGHT_NUM_THREADS",
       "threads at most; the default is min(affinity, cgroup quota, OMP_NUM_THREADS, this)"},
      {"OMP_NUM_THREADS", "threads at most, for OpenMP's programs and this library alike"},
      {"TILEWRIGHT_SPIN_US",
       "how long an idle worker spins before it sleeps, in microseconds (default 20)"},
      {"TILEWRIGHT_POISON",
       "1: results and scratch memory start as NaN, so that a test sees what is read unwritten"},
      {"TILEWRIGHT_SYNC",
       "1: each CUDA kernel is waited for, so that an error names the kernel whose it is"},
      {"TILEWRIGHT_TRACE", "1: one CSV line per kernel call on standard error"},
  };
  return table;
}

std::string get(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

bool poison() {
  static const bool on = get_int("TILEWRIGHT_POISON", 0) != 0;
  return on;
}

long get_int(const char* name, long otherwise) {
  const std::string value = get(name);
  if (value.empty()) return otherwise;
  char* end = nullptr;
  const long number = std::strtol(value.c_str(), &end, 10);
  return *end == '\0' || *end == ',' ? number : otherwise;
}

}  // namespace tilewright::env
