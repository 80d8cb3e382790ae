// The tile registers of AMX in memory, for a CPU with AVX-512 that has none (TILEWRIGHT_EMULATE_AMX).
// For tests: a product takes some hundred cycles where the units take 16.
//
// Bits are those of the operations in the manual. Tiles that are touched outside of begin_tiles() and
// end_tiles() end the process, as on hardware; what is in them afterwards is not zero but garbage.
//
// Source: Intel Architecture Software Developer's Manual, volume 2, TDPBF16PS, TDPBSSD, TDPBUSD.
#pragma once
#include "simd/tiles.h"

namespace tilewright::ISA {

struct Tiles {
  alignas(64) VecU line[8][kTileLines];
  bool held;
};
// A thread has one set, whichever file touches it: gemm_amx.cc has it for the level. A program that
// takes a file of it alone has its own.
#if defined(TILEWRIGHT_OWN_TILES)
static __thread Tiles t_tiles;
#else
extern __thread Tiles t_tiles;
#endif

namespace {

constexpr const char* kTileUnits = "AMX tiles, emulated";

inline void fill_tiles(uint32_t word) {
  for (auto& tile : t_tiles.line) {
    for (VecU& line : tile) line = VecU{} + word;
  }
}
inline void begin_tiles() {
  if (t_tiles.held) __builtin_trap();  // hardware would take it; but whose sums are in them?
  fill_tiles(0);
  t_tiles.held = true;
}
inline void end_tiles() {
  fill_tiles(0x7fc07fc0);  // NaN, whatever the type
  t_tiles.held = false;
}

template <int t>
TW_INLINE VecU* tile() {
  if (!t_tiles.held) __builtin_trap();
  return t_tiles.line[t];
}

template <int t>
TW_INLINE void clear_tile() {
  VecU* const lines = tile<t>();
  for (int i = 0; i < kTileLines; ++i) lines[i] = VecU{};
}
template <int t>
TW_INLINE void load_tile(const void* p, int64_t stride) {
  VecU* const lines = tile<t>();
  for (int i = 0; i < kTileLines; ++i) {
    memcpy(&lines[i], static_cast<const char*>(p) + i * stride, sizeof lines[i]);
  }
}
template <int t>
TW_INLINE void stream_tile(const void* p, int64_t stride) {
  load_tile<t>(p, stride);
}
template <int t>
TW_INLINE void store_tile(void* p, int64_t stride) {
  const VecU* const lines = tile<t>();
  for (int i = 0; i < kTileLines; ++i) {
    memcpy(static_cast<char*>(p) + i * stride, &lines[i], sizeof lines[i]);
  }
}

// Subnormal numbers count as zero and become zero, to the nearest, whatever the thread has chosen.
class ZeroSubnormals {
 public:
  ZeroSubnormals() : before_(__builtin_ia32_stmxcsr()) {
    __builtin_ia32_ldmxcsr(0x1f80 | 0x8040);  // DAZ, FTZ
  }
  ~ZeroSubnormals() { __builtin_ia32_ldmxcsr(before_); }

 private:
  const unsigned before_;
};

// Both halves of a word are multiplied and added up apart, and added to the sum at the end.
__attribute__((noinline)) void add_products_bf16(VecU* sum, const VecU* a, const VecU* b) {
  const ZeroSubnormals here;
  const auto lower = [](VecU words) { return (Vec)(words << 16); };
  const auto upper = [](VecU words) { return (Vec)(words & 0xffff0000); };
  for (int i = 0; i < kTileLines; ++i) {
    Vec lower_sum = {}, upper_sum = {};
    for (int k = 0; k < kTileLines; ++k) {
      const VecU word = VecU{} + a[i][k];
      lower_sum = fma(lower(word), lower(b[k]), lower_sum);
      upper_sum = fma(upper(word), upper(b[k]), upper_sum);
    }
    sum[i] = (VecU)((Vec)sum[i] + (lower_sum + upper_sum));
  }
}

// Modulo 2^32. Byte e of each word, as a number of 32 bits.
template <bool is_signed>
TW_INLINE VecI byte_of(VecU words, int e) {
  const VecU shifted = words << (24 - 8 * e);
  return is_signed ? (VecI)shifted >> 24 : (VecI)(shifted >> 24);
}
template <bool signed_a>
__attribute__((noinline)) void add_products_bytes(VecU* sum, const VecU* a, const VecU* b) {
  for (int i = 0; i < kTileLines; ++i) {
    for (int k = 0; k < kTileLines; ++k) {
      const VecU word = VecU{} + a[i][k];
      for (int e = 0; e < 4; ++e) {
        sum[i] += (VecU)(byte_of<signed_a>(word, e) * byte_of<true>(b[k], e));
      }
    }
  }
}

template <Words w, int sum, int a, int b>
TW_INLINE void multiply_tiles() {
  if constexpr (w == Words::bf16) {
    add_products_bf16(tile<sum>(), tile<a>(), tile<b>());
  } else {
    add_products_bytes<w == Words::s8>(tile<sum>(), tile<a>(), tile<b>());
  }
}

}  // namespace
}  // namespace tilewright::ISA
