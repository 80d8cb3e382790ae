// Runs CUDA kernels on the CPU, one fiber for each CUDA thread, and checks them while they run.
//
// This is the host's view: launching, settings, device memory, counters. What kernels call is in
// operations.h, which reaches them through cuda/gpu/gpu.h. Built for tests, never part of a wheel.
//
// Two ways to compile a kernel, one emulator for both:
//   fast     plain. Bounds, alignment, whole warps and diverging barriers are checked where the
//            kernel calls the gpu layer; memory nobody has written holds NaN.
//   checked  with -fsanitize=thread, whose calls before each load and store come here instead of to
//            libtsan (hooks.cc). Then plain C++ is checked as well: races, bounds, reads of shared
//            memory that nobody wrote; and memory traffic is counted line by line.
#pragma once
#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "tilewright/errors.h"

namespace tilewright::emulator {

struct Parameter {
  const void* data;
  std::size_t size;
};

struct Launch {
  std::string what;  // kernel, grid, block and shared memory, as an error names them
  dim3 grid, block;
  std::size_t shared_bytes;
  const void* parameters;  // kernels may read these bytes besides device memory
  std::size_t parameter_bytes;
  void (*body)(const void* parameters);
  const void* kernel;                 // the function itself, for whoever looks up its name
  std::span<const Parameter> single;  // each parameter alone: compilers lay out tuples differently
};

// A launch with findings: what() has one line for each, with file:line, block and thread.
struct Fault : DeviceError {
  using DeviceError::DeviceError;
};

// Runs all blocks, one after another on the calling thread; throws Fault when anything was found.
void run(const Launch& launch);

// Is offered each launch first, and returns true if it has run it. An empty one runs none.
using Runner = std::function<bool(const Launch&)>;
void set_runner(Runner runner);

// Which of the threads that can go on goes on first: blocks, warps and lanes alike. A right kernel
// gives the same bits in every order.
enum class Order : std::uint8_t { in_order, reversed, shuffled };
// `seed` is for shuffled; the same seed gives the same sequence of launches the same orders.
void set_schedule(Order order, unsigned seed = 0);

// How a floating-point mma sums. rounded: the products in float, to the nearest, then added to the
// accumulator. truncated: as tensor cores do; products and accumulator are cut to 24 bits of the
// largest of them, added, and the sum is cut again, toward zero, every 8 products (tf32: 4). No bit
// is kept below those 24, which is less than newer cards keep: a bound that holds here holds there.
enum class Accumulation : std::uint8_t { rounded, truncated };
void set_accumulation(Accumulation accumulation);

// Shared memory that a block may have: cards differ. 227 KiB (sm_90) unless set; 163 KiB on sm_80,
// 99 KiB on sm_86, sm_89 and sm_120.
void set_shared_limit(std::size_t bytes);

// True when kernels of this program were compiled for checking (see above).
bool checked();

// Device memory: host code may touch it like any other. Fresh bytes are 0xFF, a NaN in each float
// format. A freed range is not handed out again before the arena has been used up.
void* allocate(std::size_t bytes);         // nullptr when there is no room
void release(void* pointer);               // DeviceError when allocate() did not give it
std::size_t allocated_bytes();             // what is not released yet
void set_memory_limit(std::size_t bytes);  // as if the card had no more; the arena is 4 GiB
std::vector<std::pair<std::uintptr_t, std::size_t>> allocations();  // where, and how many bytes

// Traffic of one line of a kernel, in the hardware's units: wavefronts of shared memory (32 banks
// of 4 bytes), sectors of 32 bytes of global memory. "ideal" is what the same bytes would need.
struct SiteCounters {
  std::string where;  // file:line
  const char* space;  // "shared" or "global"
  bool write;
  std::uint64_t instructions;  // of a warp
  std::uint64_t wavefronts, ideal_wavefronts;
  std::uint64_t sectors, ideal_sectors;
};

struct Counters {
  std::uint64_t launches = 0, blocks = 0, barriers = 0, warp_barriers = 0;
  std::uint64_t shuffles = 0, mma = 0, ldmatrix = 0, cp_async = 0;  // instructions of a warp
  std::uint64_t ldmatrix_wavefronts = 0, ldmatrix_ideal = 0;
  std::vector<SiteCounters> sites;  // plain loads and stores appear only in checked kernels
};

// The counters since the last call.
Counters take_counters();

}  // namespace tilewright::emulator
