// A launch as errors name it, and the limits that every card has: the same on a GPU and emulated.
#pragma once
#include <vector_types.h>

#include <cstddef>
#include <string>

#include "tilewright/errors.h"

namespace tilewright::gpu {

constexpr std::size_t kMaxParameterBytes = 4096;

struct Geometry {
  const char* name;
  dim3 grid, block;
  std::size_t shared_bytes;
};

// "matmul_f32: grid (4, 1, 1), block (128, 1, 1), 4096 bytes of shared memory"
inline std::string describe(const Geometry& g) {
  const auto triple = [](const dim3& d) {
    return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) +
           ")";
  };
  return std::string(g.name) + ": grid " + triple(g.grid) + ", block " + triple(g.block) + ", " +
         std::to_string(g.shared_bytes) + " bytes of shared memory";
}

// How much shared memory a block may have depends on the card: not here.
inline void check_limits(const Geometry& g) {
  const auto check = [&g](const char* what, unsigned value, unsigned most) {
    if (value >= 1 && value <= most) return;
    throw DeviceError(describe(g) + ": " + what + " must be 1 to " + std::to_string(most) +
                      ", got " + std::to_string(value));
  };
  check("grid.x", g.grid.x, 0x7fffffff);
  check("grid.y", g.grid.y, 65535);
  check("grid.z", g.grid.z, 65535);
  check("block.x", g.block.x, 1024);
  check("block.y", g.block.y, 1024);
  check("block.z", g.block.z, 64);
  const unsigned long long threads = 1ull * g.block.x * g.block.y * g.block.z;
  if (threads > 1024) {
    throw DeviceError(describe(g) + ": a block has at most 1024 threads, got " +
                      std::to_string(threads));
  }
}

}  // namespace tilewright::gpu
