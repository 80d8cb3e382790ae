// The tile registers of AMX, as instructions of our own.
//
// A tile is 16 rows of 64 bytes. Eight of them are held by a thread between begin_tiles() and
// end_tiles(), and always used like this, 32 x 32 sums of products:
//
//                  tmm6      tmm7             b, 16 words of K a tile: word [k][j]
//               +---------+---------+
//        tmm4   |  tmm0   |  tmm1   |         a, 16 words of K a tile: word [i][k]
//               +---------+---------+
//        tmm5   |  tmm2   |  tmm3   |         a word is 2 bfloat16 or 4 bytes, neighbours along K
//               +---------+---------+
//
// Why not the compiler's intrinsics: in GCC 12 the one that loads the configuration names 8 bytes of
// its operand, and the one that loads a tile no memory at all; stores before them are dropped (a
// local configuration became a single byte and SIGILL). Here every instruction is volatile and
// clobbers memory; the configuration is a constant. A test bans the intrinsics.
//
// Source: Intel Architecture Instruction Set Extensions Programming Reference, chapter 3 (AMX).
#pragma once
#include <stdint.h>

#include "cpu/kernels_gemm.h"
#include "simd/vec.h"

namespace tilewright::ISA {
namespace {

constexpr int kTileLines = 16;
constexpr int64_t kTileBytes = 1024;

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

// What a word holds: both factors bfloat16, or int8 with a signed or not.
enum class Words { bf16, s8, u8 };

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

// The sums of the picture, one row of tiles or both, from zero and to a row-major (32, 32).
template <bool both>
TW_INLINE void clear_sums() {
  clear_tile<0>();
  clear_tile<1>();
  if constexpr (both) clear_tile<2>(), clear_tile<3>();
}
template <bool both>
TW_INLINE void store_sums(char* out) {
  constexpr int64_t line = 128;
  store_tile<0>(out, line);
  store_tile<1>(out + 64, line);
  if constexpr (both)
    store_tile<2>(out + 16 * line, line), store_tile<3>(out + 16 * line + 64, line);
}

// sum (32, 32) += tile, or = tile where first: vectors [from, to) of 64. V: of what the words' sums
// are.
template <class V>
TW_INLINE void add_vectors(bool first, const void* tile, void* sum, int64_t from, int64_t to) {
  const auto source = static_cast<const V*>(tile);
  const auto sums = static_cast<V*>(sum);
  for (int64_t i = from; i < to; ++i) sums[i] = first ? source[i] : sums[i] + source[i];
}
template <class V>
void add_sums(bool first, const void* tile, void* sum) {
  add_vectors<V>(first, tile, sum, 0, 64);
}

// GemmAside in equal parts, for a loop of tile instructions to do between them. Tile instructions
// wait for tiles only, so the units never run dry; behind a whole tile the same work would stand
// still until its sums are stored (measured: 15 % of the product's time, in the loop none).
template <class V, void (*prepare)(int64_t, int64_t, int64_t, const void*, int64_t, void*)>
class Beside {
 public:
  // `unit`: lines that are prepared at a time.
  Beside(const GemmAside& a, int64_t parts, int64_t unit)
      : a_(a),
        vectors_(a.tile ? share(64, parts) : 0),
        prepared_(a.panel ? share((a.to - a.from) / unit, parts) * unit : 0),
        ahead_(share(a.ahead.lines, parts)),
        out_(share(a.out.lines, parts)),
        line_(a.from) {}
  TW_INLINE void next_part() {
    fetch(a_.ahead, ahead_, ahead_at_);
    fetch(a_.out, out_, out_at_);
    if (vectors_ > 0) {
      const int64_t to = least(vector_ + vectors_, 64);
      add_vectors<V>(a_.first, a_.tile, a_.sum, vector_, to);
      vector_ = to;
    }
    if constexpr (prepare != nullptr) {
      if (prepared_ == 0 || line_ == a_.to) return;
      const int64_t to = least(line_ + prepared_, a_.to);
      prepare(line_, to, a_.kc, a_.b, a_.ldb, a_.panel);
      line_ = to;
    }
  }

 private:
  // Without any K there are no parts, and nothing waits for them.
  static int64_t share(int64_t count, int64_t parts) {
    return parts > 0 ? (count + parts - 1) / parts : 0;
  }
  TW_INLINE static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
  // Into the second cache.
  TW_INLINE static void fetch(const CacheLines& from, int64_t count, int64_t& at) {
    for (const int64_t to = least(at + count, from.lines); at < to; ++at) {
      const char* const line = from.data + at * from.stride;
      for (int64_t i = 0; i < from.width; i += 64) __builtin_prefetch(line + i, 0, 2);
    }
  }

  const GemmAside& a_;
  const int64_t vectors_, prepared_, ahead_, out_;  // of a part
  int64_t vector_ = 0, line_, ahead_at_ = 0, out_at_ = 0;
};

template <Words w, bool both>
TW_INLINE void multiply_all() {
  multiply_tiles<w, 0, 4, 6>();
  multiply_tiles<w, 1, 4, 7>();
  if constexpr (both) multiply_tiles<w, 2, 5, 6>(), multiply_tiles<w, 3, 5, 7>();
}

}  // namespace
}  // namespace tilewright::ISA
