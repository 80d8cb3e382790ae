// GEMM: pack B once per chunk of NC columns, then give every thread blocks of (MC, NT) of the
// output.
//
//   for jc in N by NC                 B's chunk (K, NC) packed by all threads
//     for each block (ic, jt)         in parallel: (MC, NT) of the output, one task: gemm_block.cc
//       for pc in K by KC             A's block (MC, KC) packed by the task's thread: stays in L2
//         for jr in NT by NR          B's panel (KC, NR): stays in L1
//           for ir in MC by MR        the micro-kernel, which fetches its share of the next panel of B
//
// K is the innermost of the outer loops, and a block's partial sums (MC, NT) are the thread's own: C
// is written once, whatever K, by the last block's tiles or the epilogue, and `out` may be the
// residual. K is never split between threads.
//
// B comes from L3 or beyond, once for each MC rows: few bytes, but a panel of 32 KB every 10 us, none
// of which the hardware foresees. Fetched a line at a time by the tiles before (GemmBlock::next_panel)
// it is in L2 when it is needed; unfetched, a product of 2048 took 5 to 7 % longer.
//
// Parameter  bounded by
// MC         A's block MC x KC words in a quarter of L2 (of the kernel family: 168 are 12 x 14,
//            28 x 6, 42 x 4 rows; x KC 256 words = 172 KB); below: B is read N / MC times
// NT         partial sums MC x NT words, read and written in order, once for each block of K: a share
//            of L3 (168 x 2048 words = 1.4 MB); below: A is packed N / NT times
// NC         B's packed chunk K x NC words: kChunkBytes of shared cache and scratch
#include "cpu/gemm.h"

#include <algorithm>
#include <cstdlib>
#include <new>
#include <optional>
#include <string>

#include "core/pages.h"
#include "core/parallel.h"
#include "core/scratch.h"
#include "core/size.h"
#include "core/trace.h"
#include "cpu/gemm_block.h"
#include "cpu/gemm_pipeline.h"
#include "cpu/gemm_weights.h"
#include "cpu/qgemm.h"

namespace tilewright {
namespace {

constexpr int64_t kChunkBytes = 32 << 20;
// Multiply-adds of a task for each lane of NR: about 20 ms at every level, which have NR in
// proportion to their speed.
constexpr int64_t kTaskWork = 1 << 25;
// Up to here B is read in place where its rows are contiguous: so few rows don't repay packing, and
// so small a matrix stays in L1 as it is.
constexpr int kFewRows = 4;
constexpr int64_t kSmallWords = 4096;

// Bytes of N columns of KW words, packed.
int64_t packed_bytes(int64_t KW, int64_t N, const GemmKernels& g) {
  return product_of({KW, round_up(N, g.NR), g.b_bytes}) + kPackSlack * g.b_bytes;
}

// Where B's rows are contiguous, a few lines of many panels side by side: rows are read in long
// pieces, not in as many visits as they have panels. Where its columns are, one panel after the other.
void pack_columns(const Matrix& b, int64_t K, int64_t jc, int64_t nc, const GemmKernels& g,
                  char* packed, bool parallel) {
  const bool columns = b.row == 1 && b.col != 1;
  const int64_t wide = (columns ? 1 : 16) * g.NR, lines = columns ? 256 : 8;
  const int64_t deep = columns ? 256 : 64;  // lines of a task
  const int64_t KW = words_of(K, g), groups = divide_up(nc, wide);
  const auto pack_group = [&](int64_t t) {
    const int64_t j0 = t % groups * wide, j1 = std::min(nc, j0 + wide);
    const int64_t k0 = t / groups * deep, k1 = std::min(KW, k0 + deep);
    for (int64_t k = k0; k < k1; k += lines) {
      for (int64_t j = j0; j < j1; j += g.NR) {
        const int nr = int(std::min<int64_t>(g.NR, nc - j));
        g.pack_b(b, jc + j, nr, k, std::min(lines, k1 - k), K,
                 packed + panel_offset(k, j, KW, g.NR) * g.b_bytes);
      }
    }
    poll_after(0.2 * double((k1 - k0) * wide));
  };
  const int64_t tasks = groups * divide_up(KW, deep);
  if (parallel) {
    parallel_for(tasks, double(KW) * double(round_up(nc, g.NR)) * 0.1, pack_group);
  } else {
    for (int64_t t = 0; t < tasks; ++t) pack_group(t);
  }
}

// Kernels that prepare panels read the matrix anyway, once for each block of rows: up to two of them cost
// less than to put the panels in one piece, beside tiles; elsewhere one.
bool reads_in_place(const Gemm& p, const GemmKernels& g) {
  if (p.packed || p.b.col != 1) return false;
  if (g.prepare) {
    const int blocks = g.tile_beside ? 2 : 1;
    return p.M <= blocks * g.MC && (g.k_per_word > 1 || p.b.dtype == DType::f32);
  }
  if (p.b.dtype != DType::f32 || g.k_per_word != 1) return false;
  return p.M <= kFewRows || p.K * p.N <= kSmallWords;
}

// How the output is cut into tasks: blocks as large as the caches allow, but two for each of the
// `parts` threads, so that one which wakes late still finds work, and however large K is, short
// enough that Ctrl-C need not wait. Register tiles are dealt
// out evenly: blocks differ by at most one row and one column of tiles.
struct Blocking {
  int64_t NR;                      // columns of a tile: of few rows, panels side by side
  int64_t row_tiles, col_tiles;    // of the whole output
  int64_t row_blocks, col_blocks;  // tasks

  // Rounded up: the larger blocks come first, so that the last ones to finish are small.
  static int64_t begin(int64_t tiles, int64_t blocks, int64_t t) {
    return divide_up(tiles * t, blocks);
  }
};
Blocking choose_blocking(const Gemm& p, int64_t nc, const GemmKernels& g, int64_t parts) {
  const int64_t M = p.M, KW = words_of(p.K, g);
  const int64_t wide = cpu::meets_few_rows(p, g) ? p.weights->wide : 1;
  const int64_t NR = nc >= parts * wide * g.NR ? wide * g.NR : g.NR;
  int64_t row_blocks = divide_up(M, g.MC), col_blocks = divide_up(nc, g.NT);
  if (parts > 1 && row_blocks * col_blocks % (2 * parts) != 0) {
    if (M >= parts * 4 * g.MR) {
      row_blocks = std::max(2 * parts, round_up(row_blocks, parts));
    } else {
      col_blocks = round_up(col_blocks, parts);
    }
  }
  // Panels that are prepared for each block of rows: smaller tasks are narrower ones, not lower.
  if (parts > 1 && g.prepare && !g.tile_beside) {
    col_blocks = std::max(col_blocks, divide_up(4 * parts, row_blocks));
  }
  const int64_t row_tiles = divide_up(M, g.MR), col_tiles = divide_up(nc, NR);
  int64_t rows = divide_up(row_tiles, row_blocks), cols = divide_up(col_tiles, col_blocks);
  const int64_t tiles =
      std::max<int64_t>(1, kTaskWork / std::max<int64_t>(KW, 1) / (g.MR * NR / g.NR));
  cols = std::clamp<int64_t>(tiles / rows, 1, cols);
  rows = std::clamp<int64_t>(tiles / cols, 1, rows);
  return {NR, row_tiles, col_tiles, divide_up(row_tiles, rows), divide_up(col_tiles, cols)};
}

void run_gemm(const Gemm& p, const GemmKernels& g, bool parallel) {
  if (p.M == 0 || p.N == 0) return;
  const int64_t KW = words_of(p.K, g);
  const bool direct = reads_in_place(p, g), by_groups = p.weights && g.k_per_word > 1;
  std::optional<cpu::FewRows> few;
  if (cpu::meets_few_rows(p, g)) few.emplace(p, g);
  const int64_t NC = p.packed || direct
                         ? round_up(p.N, g.NR)
                         : std::max<int64_t>(g.NR, kChunkBytes / g.b_bytes /
                                                       std::max<int64_t>(KW, 1) / g.NR * g.NR);
  for (int64_t jc = 0; jc < p.N; jc += NC) {
    const int64_t nc = std::min(NC, p.N - jc);
    const Scratch packed(p.packed || direct ? 0 : packed_bytes(KW, nc, g));
    PanelSource source;
    if (direct) {
      source.direct = &p.b;
    } else if (p.weights) {
      source.narrow = p.packed, source.weights = p.weights;
    } else if (p.packed) {
      source.packed = p.packed->data();
    } else {
      pack_columns(p.b, p.K, jc, nc, g, packed.as<char>(), parallel);
      source.packed = packed.as<char>(), source.origin = jc;
    }
    Team team(parallel ? gemm_ns(p.M, nc, p.K, g) : 0, parallel ? kMaxThreads : 1);
    const Blocking blocks = choose_blocking(p, nc, g, team.threads());
    if (Trace::described()) {
      Trace::detail("blocks", std::to_string(blocks.row_blocks) + " x " +
                                  std::to_string(blocks.col_blocks) + " of the output, at most " +
                                  std::to_string(g.MC) + " x " + std::to_string(g.NT));
    }
    const auto task = [&](int64_t t) {
      const int64_t r = t % blocks.row_blocks, c = t / blocks.row_blocks;
      const auto row = [&](int64_t block) {
        return std::min(p.M, g.MR * Blocking::begin(blocks.row_tiles, blocks.row_blocks, block));
      };
      const auto col = [&](int64_t block) {
        return std::min(nc,
                        blocks.NR * Blocking::begin(blocks.col_tiles, blocks.col_blocks, block));
      };
      const int64_t mc = row(r + 1) - row(r), nt = col(c + 1) - col(c);
      if (few) return few->multiply(row(r), mc, jc + col(c), nt);
      if (by_groups) return cpu::multiply_groups(p, g, row(r), mc, jc + col(c), nt);
      if (g.tile_beside) return GemmPipeline(p, g, source, row(r), mc, jc + col(c), nt).run();
      GemmBlock(p, g, source, row(r), mc, jc + col(c), nt).run();
    };
    const int64_t tasks = blocks.row_blocks * blocks.col_blocks;
    if (parallel) {
      team.run(tasks, task);
    } else {
      for (int64_t t = 0; t < tasks; ++t) task(t);
    }
  }
}

}  // namespace

void PackedMatrix::Free::operator()(char* p) const {
  std::free(p);
}

PackedMatrix::PackedMatrix(const Matrix& b, int64_t k, int64_t n, const GemmKernels& g,
                           const char* level, bool prefers_latency)
    : K(k), N(n), dtype(b.dtype), isa(level), latency(prefers_latency) {
  allocate(packed_bytes(words_of(K, g), N, g));
  pack_columns(b, K, 0, N, g, data_.get(), true);
}

WeightPanel PackedMatrix::panel_of_halves(int64_t j) const {
  const int64_t lines = divide_up(K, 2), one_group = std::max<int64_t>(K, 1);
  return {data() + j * lines * 4, 16, 0, one_group, nullptr, nullptr, 0, lines, dtype};
}

void PackedMatrix::allocate(int64_t bytes) {
  bytes_ = (bytes + 63) & ~int64_t(63);
  data_.reset(static_cast<char*>(allocate_pages(size_t(bytes_))));
  if (!data_) throw std::bad_alloc();
}

void describe(const Gemm& p, const GemmKernels& g) {
  const bool direct = reads_in_place(p, g);
  const bool floats = p.weights && !p.packed->bits;
  Trace::kernel(p.weights && !floats ? g.names.weights
                : p.packed           ? g.names.packed
                : direct             ? g.names.in_place
                                     : g.names.plain);
  if (!Trace::described()) return;
  Trace::detail("tile", std::to_string(g.MR) + " x " + std::to_string(g.NR) + " in " + g.units +
                            ", K in blocks of " + std::to_string(g.KC * g.k_per_word));
  if (direct)
    Trace::note(
        "b is read where it is: its rows are contiguous, and it is small or meets few rows");
  if (floats) {
    Trace::note(cpu::meets_few_rows(p, g)
                    ? "b has 16 bits in memory: few rows make float32 of it in registers"
                    : "b has 16 bits in memory: float32 is made of one panel after the other");
  }
  if (!direct && !p.packed) Trace::note("b is packed in every call: tw.pack(b) does it once");
}

// Multiply-adds at the speed of NR lanes, in pairs where words are pairs; few rows wait for B.
double gemm_ns(int64_t M, int64_t N, int64_t K, const GemmKernels& g) {
  constexpr double kLaneFlops = 6.5, kBytes = 80;  // a ns, from a cache that is not the nearest
  const double words = double(std::max<int64_t>(words_of(K, g), 1)) * double(N);
  return words * (2.0 * double(M) / (kLaneFlops * g.NR) + g.b_bytes / kBytes);
}

void gemm(const Gemm& p, const GemmKernels& g) {
  run_gemm(p, g, true);
}
void gemm_serial(const Gemm& p, const GemmKernels& g) {
  run_gemm(p, g, false);
}

}  // namespace tilewright
