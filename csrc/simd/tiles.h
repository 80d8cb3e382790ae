// The tile registers of AMX, as instructions of our own; emulated where the build asks for it.
//
// A tile is 16 rows of 64 bytes. Eight of them are held by a thread between begin_tiles() and
// end_tiles().
//
// Why not the compiler's intrinsics: in GCC 12 the one that loads the configuration names 8 bytes of
// its operand, and the one that loads a tile no memory at all; stores before them are dropped (a
// local configuration became a single byte and SIGILL). Here every instruction is volatile and
// clobbers memory; the configuration is a constant. A test bans the intrinsics.
//
// Source: Intel Architecture Instruction Set Extensions Programming Reference, chapter 3 (AMX).
#pragma once
#include <stdint.h>

#include "simd/vec.h"

namespace tilewright::ISA {
namespace {

constexpr int kTileLines = 16;
constexpr int64_t kTileBytes = 1024;

// What a word holds: both factors bfloat16, or int8 with a signed or not.
enum class Words { bf16, s8, u8 };

}  // namespace
}  // namespace tilewright::ISA

#if defined(TILEWRIGHT_EMULATE_AMX)
#include "simd/tiles_emulated.h"
#else

namespace tilewright::ISA {
namespace {

constexpr const char* kTileUnits = "AMX tiles";

struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t line_bytes[16];
  uint8_t lines[16];
};
constexpr TileConfig kEightTiles = {
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
static_assert(sizeof(TileConfig) == 64);

inline void begin_tiles() {
  asm volatile("ldtilecfg %0" : : "m"(kEightTiles) : "memory");
}
inline void end_tiles() {
  asm volatile("tilerelease" : : : "memory");
}

template <int t>
TW_INLINE void clear_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(t) : "memory");
}
template <int t>
TW_INLINE void load_tile(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(t) : "memory");
}
// Without a place in the cache: for what is read once, beside what should stay.
template <int t>
TW_INLINE void stream_tile(const void* p, int64_t stride) {
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(t) : "memory");
}
template <int t>
TW_INLINE void store_tile(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(t) : "memory");
}

// sum += a * b
template <Words w, int sum, int a, int b>
TW_INLINE void multiply_tiles() {
  if constexpr (w == Words::bf16) {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sum), "i"(a), "i"(b) : "memory");
  } else if constexpr (w == Words::s8) {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sum), "i"(a), "i"(b) : "memory");
  } else {
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sum), "i"(a), "i"(b) : "memory");
  }
}

}  // namespace
}  // namespace tilewright::ISA

#endif
