// How products on AMX use the eight tiles (simd/tiles.h): 32 x 32 sums, and other work beside them.
//
//                  tmm6      tmm7             b, 16 words of K a tile: word [k][j]
//               +---------+---------+
//        tmm4   |  tmm0   |  tmm1   |         a, 16 words of K a tile: word [i][k]
//               +---------+---------+
//        tmm5   |  tmm2   |  tmm3   |         a word is 2 bfloat16 or 4 bytes, neighbours along K
//               +---------+---------+
#pragma once
#include <stdint.h>

#include "cpu/kernels_gemm.h"
#include "simd/tiles.h"
#include "simd/vec.h"

namespace tilewright::ISA {
namespace {

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

TW_INLINE VecI not_finite(Vec x) {
  return ~(abs(x) < __builtin_inff());
}
TW_INLINE VecI not_finite(VecU) {
  return VecI{};
}

// GemmAside in equal parts, for a loop of tile instructions to do between them. Tile instructions
// wait for tiles only, so the units never run dry; behind a whole tile the same work would stand
// still until its sums are stored (measured: 15 % of the product's time, in the loop none).
//
// V: a vector of what the sums are; kUnit: words of K that are prepared at a time.
template <class V, void (*pack)(const RowPanel&, int64_t, int64_t),
          void (*prepare)(const ColumnPanel&, int64_t, int64_t), int64_t kUnit>
class Beside {
 public:
  Beside(const GemmAside& a, int64_t parts)
      : a_(a),
        rows_(a.tile ? a.mr : 0, parts),
        packed_(a.rows.panel ? kTileLines * 2 : 0, parts),
        prepared_(a.columns.panel ? (a.columns_to - a.columns_from) / kUnit : 0, parts),
        ahead_{{a.ahead[0].lines, parts}, {a.ahead[1].lines, parts}, {a.ahead[2].lines, parts}} {}
  TW_INLINE void next_part() {
    if (ahead_[0].left()) fetch(a_.ahead[0], ahead_[0]);
    if (ahead_[1].left()) fetch(a_.ahead[1], ahead_[1]);
    if (ahead_[2].left()) fetch(a_.ahead[2], ahead_[2]);
    if (rows_.left()) rows_.take([&](int64_t from, int64_t to) { finish(int(from), int(to)); });
    if (packed_.left()) packed_.take([&](int64_t from, int64_t to) { pack(a_.rows, from, to); });
    if (!prepared_.left()) return;
    prepared_.take([&](int64_t from, int64_t to) {
      const int64_t first = a_.columns_from;
      prepare(a_.columns, first + from * kUnit, first + to * kUnit);
    });
  }
  // What the parts left over: all of it where there were none.
  TW_INLINE void rest() {
    while (rows_.left() || packed_.left() || prepared_.left()) next_part();
  }

 private:
  struct Share {
    int64_t count, each, at = 0;
    Share(int64_t n, int64_t parts) : count(n), each(parts > 0 ? (n + parts - 1) / parts : n) {}
    bool left() const { return at < count; }
    template <class Body>
    TW_INLINE void take(const Body& body) {
      const int64_t to = at + each < count ? at + each : count;
      body(at, to);
      at = to;
    }
  };
  // Into the second cache.
  TW_INLINE static void fetch(const CacheLines& lines, Share& share) {
    share.take([&](int64_t line, int64_t end) {
      for (; line < end; ++line) {
        const char* const p = lines.data + line * lines.stride;
        for (int64_t i = 0; i < lines.width; i += 64) __builtin_prefetch(p + i, 0, 2);
        __builtin_prefetch(p + lines.width - 1, 0, 2);
      }
    });
  }
  TW_INLINE void finish(int from, int to) {
    V* const tile = static_cast<V*>(a_.tile);
    V* const sum = static_cast<V*>(a_.sum);
    if (!a_.epilogue) {
      if (a_.first) {
        for (int v = 2 * from; v < 2 * to; ++v) sum[v] = tile[v];
      } else {
        for (int v = 2 * from; v < 2 * to; ++v) sum[v] = sum[v] + tile[v];
      }
      return;
    }
    VecI bad = {};
    for (int v = 2 * from; v < 2 * to; ++v) {
      if (!a_.first) tile[v] = sum[v] + tile[v];
      bad |= not_finite(tile[v]);
    }
    if (a_.unstored) {
      const uint32_t these = (uint32_t(1) << (to - 1) << 1) - (uint32_t(1) << from);
      if (any(bad)) *a_.unstored |= these;
      if (*a_.unstored & these) {
        *a_.unstored |= these;
        return;
      }
    }
    a_.store(tile + 2 * from, a_.i + from, to - from, a_.j, a_.nr, *a_.epilogue);
  }

  const GemmAside& a_;
  Share rows_, packed_, prepared_, ahead_[3];
};

template <Words w, bool both>
TW_INLINE void multiply_all() {
  multiply_tiles<w, 0, 4, 6>();
  multiply_tiles<w, 1, 4, 7>();
  if constexpr (both) multiply_tiles<w, 2, 5, 6>(), multiply_tiles<w, 3, 5, 7>();
}

}  // namespace
}  // namespace tilewright::ISA
