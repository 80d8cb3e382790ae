// The state of the emulated device: what the other files of this folder share and nobody else sees.
// One launch runs at a time, all of it on the OS thread that called run(): no locks below that.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "emulator/emulator.h"
#include "emulator/operations.h"

namespace tilewright::emulator {

constexpr unsigned kLanes = 32, kMaxThreads = 1024, kMaxWarps = kMaxThreads / kLanes;
constexpr std::size_t kStackBytes = 128 * 1024;  // a thread's registers and local memory
constexpr std::size_t kSharedLimit = 227 * 1024, kSharedReserved = 1024 * 1024;
constexpr std::size_t kArenaBytes = std::size_t{1} << 32;
constexpr unsigned char kPoison = 0xFF;

// Who touched a byte last (marks.cc), in 64 bits: there are two for each byte of memory. Counters
// wrap: blocks 2^18 apart, or 2^14 barriers, look alike, which can hide a race but not invent one.
struct Mark {
  std::uint64_t block : 18, epoch : 14, warp_epoch : 15, thread : 10;
  std::uint64_t valid : 1, several_threads : 1, several_warps : 1, several_blocks : 1;
  std::uint64_t atomic : 1, pending : 1, spare : 1;
};
static_assert(sizeof(Mark) == 8);
struct Cell {
  Mark write, read;
};

// One access of one lane, kept until the next barrier (counters.cc).
struct LogEntry {
  Site site;
  std::uintptr_t address;  // in shared memory: the offset
  std::uint16_t bytes;
  bool write, shared;
};

// A site's traffic is counted for each kind of access of its line.
struct SiteKey {
  const void* where;
  int line;
  bool shared, write;
  bool operator==(const SiteKey&) const = default;
};
struct SiteKeyHash {
  std::size_t operator()(const SiteKey& s) const {
    return reinterpret_cast<std::size_t>(s.where) * 31 +
           static_cast<std::size_t>(s.line * 4 + s.shared * 2 + s.write) * 1009;
  }
};
struct Traffic {
  std::uint64_t instructions = 0;
  std::uint64_t wavefronts = 0, ideal_wavefronts = 0, sectors = 0, ideal_sectors = 0;
};

// Lanes that wait for each other in one operation of the warp (collectives.h).
struct Collective {
  unsigned mask = 0, arrived = 0;
  const char* operation = nullptr;
  Site site;
  std::array<void*, kLanes> arguments{};
};

struct Warp {
  unsigned index = 0;
  unsigned initial = 0, live = 0, runnable = 0;  // lanes
  unsigned epoch = 0;                            // warp barriers since the block's last barrier
  unsigned first_lane = 0;                       // where shuffled schedules begin to look
  std::vector<Collective> open;                  // one for each distinct mask that lanes wait on
  std::array<std::vector<LogEntry>, kLanes> log;
};

struct Copy {
  char* to;
  const char* from;
  int bytes, source_bytes;
  Site site;
};

struct Thread {
  uint3 index{}, block_index{};
  unsigned linear = 0, lane = 0;
  Warp* warp = nullptr;
  std::uintptr_t stack_low = 0;
  void* stack_pointer = nullptr;
  std::vector<Copy> uncommitted;
  std::vector<std::vector<Copy>> groups;  // committed, not waited for
};

struct Block {
  unsigned index = 0, threads = 0, exited = 0, waiting = 0, epoch = 1;
  int predicate_sum = 0, predicate_result = 0;
  Site barrier_site;
};

// Ends the running kernel; the finding is already recorded.
struct Fatal {};

struct Machine {
  Machine();

  std::mutex mutex;
  char* stacks;
  char* shared;
  Cell* shared_cells;
  char* arena;
  Cell* arena_cells;

  // memory.cc
  std::map<std::uintptr_t, std::size_t> allocations;
  std::size_t next_offset = 0, allocated = 0, memory_limit = kArenaBytes;
  std::uintptr_t last_begin = 0, last_end = 0;           // the allocation touched last
  std::size_t cells_begin = kArenaBytes, cells_end = 0;  // of arena_cells, in use since launching

  // settings
  Order order = Order::in_order;
  unsigned seed = 0;
  Accumulation accumulation = Accumulation::rounded;
  std::size_t shared_limit = kSharedLimit;
  Runner runner;

  // the running launch
  const Launch* launch = nullptr;
  std::vector<Thread> threads{kMaxThreads};
  std::vector<Warp> warps{kMaxWarps};
  unsigned warp_count = 0;
  std::vector<unsigned> warp_order;
  std::mt19937 random;
  Block block;
  void* main_stack_pointer = nullptr;
  bool aborted = false;

  std::vector<std::string> findings;
  std::set<std::string> known_findings;
  Counters counters;
  std::unordered_map<SiteKey, Traffic, SiteKeyHash> sites;
};

extern Machine& machine;

// The running fiber's thread; none outside of kernels, and on other OS threads. (The attribute and
// constinit make it one load, without a call that would set it up.)
[[gnu::tls_model("initial-exec")]] extern constinit thread_local Thread* current;

// True while kernel code runs, false within the emulator. Library functions that both use, such as
// vector::push_back, exist once in a program, and it may be the copy compiled for checking.
[[gnu::tls_model("initial-exec")]] extern constinit thread_local bool watched;

// At the head of every operation that kernels call.
class Unwatched {
 public:
  Unwatched() { watched = false; }
  ~Unwatched() { watched = true; }
  Unwatched(const Unwatched&) = delete;
};

// Set before main, by the first object compiled for checking, perhaps before `machine` exists.
extern bool instrumented;

}  // namespace tilewright::emulator
