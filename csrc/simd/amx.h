// How products on AMX use the tiles (simd/tiles.h): 16 x 32 sums at a time, and other work beside them.
//
//                  tmm6  |  tmm6 or 7        b, 16 words of K a tile: word [k][j]
//               +---------+---------+
//        tmm4   |  tmm0   |  tmm1   |         a, 16 words of K a tile: word [i][k]
//               +---------+---------+
//                                             a word is 2 bfloat16 or 4 bytes, neighbours along K
//
// Why not 32 x 32, which loads a tile for each product instead of one and a half: tiles are renamed as
// registers are, and a core that is shared with another tenant has few to rename to. Then, for seconds,
// what is loaded or summed waits for what came before it, the longer the more tiles are in use
// (ns a product, operands in the first cache):
//
//   in use                    8     7     6     5     4      products alone
//   core of its own         7.3   7.3   7.3   7.6   7.6      7.5
//   shared                 32.6  23.4  20.2  19.7  17.5      8.9
//
#pragma once
#include <stdint.h>

#include "cpu/kernels_gemm.h"
#include "simd/tile.h"
#include "simd/tiles.h"
#include "simd/vec.h"

namespace tilewright::ISA {
namespace {

// The sums of the picture, from zero and to rows `line` bytes apart.
TW_INLINE void clear_sums() {
  clear_tile<0>();
  clear_tile<1>();
}
TW_INLINE void store_sums(char* out, int64_t line) {
  store_tile<0>(out, line);
  store_tile<1>(out + 64, line);
}

// How many parts of other work there are beside mr rows of sums, n beside 16.
TW_INLINE int64_t parts_of(int mr, int64_t n) {
  return mr > kTileLines ? 2 * n : n;
}

template <class V>
constexpr bool kIsFloats = false;
template <>
constexpr bool kIsFloats<Vec> = true;

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
        into_(into(a)),
        rows_(a.tile ? a.mr : 0, parts, 4),
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
  static constexpr bool kFloats = kIsFloats<V>;
  struct Share {
    int64_t count, each, at = 0;
    Share(int64_t n, int64_t parts, int64_t least = 1)
        : count(n), each(parts > 0 ? largest((n + parts - 1) / parts, least) : n) {}
    static int64_t largest(int64_t x, int64_t y) { return x > y ? x : y; }
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
        const auto first = reinterpret_cast<uintptr_t>(lines.data + line * lines.stride);
        for (uintptr_t p = first & ~uintptr_t(63); p < first + uintptr_t(lines.width); p += 64) {
          __builtin_prefetch(reinterpret_cast<const char*>(p), 0, 2);
        }
      }
    });
  }
  // Where rows of the tile go: to the sums; to the output as words or rounded, by loops of our own; or
  // through the epilogue.
  enum class Into { sums, words, halves, epilogue };
  static Into into(const GemmAside& a) {
    if (!a.epilogue) return Into::sums;
    const Epilogue& e = *a.epilogue;
    if (a.nr != NR) return Into::epilogue;
    if (stores_sums(e)) return Into::words;
    const bool halves = kFloats && e.out.dtype == DType::bf16 && only_rounds(e);
    return halves ? Into::halves : Into::epilogue;
  }
  TW_INLINE void finish(int from, int to) {
    V* const tile = static_cast<V*>(a_.tile);
    V* const sum = static_cast<V*>(a_.sum);
    if (into_ == Into::sums) {
      for (int v = 2 * from; v < 2 * to; ++v) sum[v] = sum[v] + tile[v];
      return;
    }
    if (sum) {
      for (int v = 2 * from; v < 2 * to; ++v) tile[v] = sum[v] + tile[v];
    }
    if (a_.unstored && leaves_back(from, to)) return;
    if (into_ == Into::words) return put_rows<V>(from, to);
    if constexpr (kFloats) {
      if (into_ == Into::halves) return put_rows<VecH>(from, to);
    }
    a_.store(tile + 2 * from, a_.i + from, to - from, a_.j, a_.nr, *a_.epilogue);
  }
  // Whether these rows are not to be stored, or not finite: then none of them is.
  TW_INLINE bool leaves_back(int from, int to) {
    const uint32_t these = (uint32_t(1) << (to - 1) << 1) - (uint32_t(1) << from);
    if constexpr (kFloats) {
      const V* const tile = static_cast<const V*>(a_.tile);
      V bad[2] = {};  // NaN after an Inf or a NaN
      for (int v = 2 * from; v < 2 * to; v += 2) {
        bad[0] = fma(tile[v], V{}, bad[0]);
        bad[1] = fma(tile[v + 1], V{}, bad[1]);
      }
      const V both = bad[0] + bad[1];
      if (any(both != both)) *a_.unstored |= these;
    }
    if (!(*a_.unstored & these)) return false;
    *a_.unstored |= these;
    return true;
  }
  // W: vectors of the output, which takes what is in the tile, as it is or rounded.
  template <class W>
  TW_INLINE void put_rows(int from, int to) {
    constexpr int64_t size = sizeof(W) / kWidth;
    const Matrix& out = a_.epilogue->out;
    const V* tile = static_cast<const V*>(a_.tile) + 2 * from;
    char* row =
        static_cast<char*>(const_cast<void*>(out.data)) + ((a_.i + from) * out.row + a_.j) * size;
    for (int i = from; i < to; ++i, tile += 2, row += out.row * size) {
      W words[2];
      for (int v = 0; v < 2; ++v) {
        if constexpr (sizeof(W) == sizeof(V)) {
          words[v] = tile[v];
        } else {
          words[v] = narrow_bf16(tile[v]);
        }
      }
      memcpy(row, words, sizeof words);
    }
  }

  const GemmAside& a_;
  const Into into_;
  Share rows_, packed_, prepared_, ahead_[3];
};

}  // namespace
}  // namespace tilewright::ISA
