// GEMM: pack B once per chunk of NC columns, then give every thread blocks of (MC, NT) of the
// output.
//
//   for jc in N by NC                 B's chunk (K, NC) packed by all threads
//     for each block (ic, jt)         in parallel: (MC, NT) of the output, one task
//       for pc in K by KC             A's block (MC, KC) packed by the task's thread: stays in L2
//         for jr in NT by NR          B's panel (KC, NR): stays in L1
//           for ir in MC by MR        the micro-kernel
//
// K is the innermost of the outer loops, so that a block's partial sums (MC, NT) stay in the
// thread's L2 and meet the epilogue there: C is written once, whatever K, and `out` may be the
// residual. K is never split between threads.
//
// Parameter  bounded by
// MC         A's block MC x KC words beside the partial sums in half of L2
// NT         partial sums MC x NT words in the other half; and enough tasks for every thread
// NC         B's packed chunk K x NC words: kChunkBytes of shared cache and scratch
#include "cpu/gemm.h"

#include <algorithm>
#include <cstdlib>
#include <new>
#include <string>

#include "core/options.h"
#include "core/parallel.h"
#include "core/scratch.h"
#include "core/size.h"
#include "core/trace.h"
#include "cpu/qgemm.h"

namespace tilewright {
namespace {

constexpr int64_t kMC = 168;  // 12 x 14, 28 x 6, 42 x 4 rows; x KC 256 words = 172 KB
constexpr int64_t kNT = 768;  // partial sums 168 x 768 words = 516 KB
constexpr int64_t kChunkBytes = 32 << 20;
// Multiply-adds of a task for each lane of NR: about 10 ms at every level, which have NR in
// proportion to their speed.
constexpr int64_t kTaskWork = 1 << 24;
constexpr int64_t kSlack = 64;  // packing may write one vector past a panel
constexpr int kFewRows = 4;     // up to here B is read in place where its rows are contiguous

int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
int64_t round_up(int64_t a, int64_t b) {
  return divide_up(a, b) * b;
}

// K counted in packed words.
int64_t words_of(int64_t K, const GemmKernels& g) {
  return divide_up(K, g.k_per_word);
}

// Where word k of panel `j / NR` lies in a packed chunk.
int64_t panel_offset(int64_t k, int64_t j, int64_t KW, int64_t NR) {
  return j * KW + k * NR;
}

// Bytes of N columns of KW words, packed.
int64_t packed_bytes(int64_t KW, int64_t N, const GemmKernels& g) {
  return product_of({KW, round_up(N, g.NR), g.b_bytes}) + kSlack * g.b_bytes;
}

void pack_columns(const Matrix& b, int64_t K, int64_t jc, int64_t nc, const GemmKernels& g,
                  char* packed, bool parallel) {
  const int64_t KW = words_of(K, g), columns = round_up(nc, g.NR), panels = columns / g.NR;
  const auto pack_panel = [&](int64_t t) {
    const int64_t j = t * g.NR;
    const int nr = int(std::min<int64_t>(g.NR, nc - j));
    for (int64_t k = 0; k < KW; k += g.KC) {
      const int64_t kc = std::min<int64_t>(g.KC, KW - k);
      g.pack_b(b, jc + j, nr, k, kc, K, packed + panel_offset(k, j, KW, g.NR) * g.b_bytes);
      poll_after(0.2 * double(kc) * g.NR);
    }
  };
  if (parallel) {
    parallel_for(panels, double(KW) * double(columns) * 0.2, pack_panel);
  } else {
    for (int64_t t = 0; t < panels; ++t) pack_panel(t);
  }
}

// B's panel for one block of K: packed; made of quantized weights; or the matrix itself where rows
// are few and contiguous.
struct PanelSource {
  const char* packed = nullptr;  // chunk that starts at column `origin`
  int64_t origin = 0;
  const Matrix* direct = nullptr;
  const PackedMatrix* quantized = nullptr;
  const WeightKernels* weights = nullptr;

  struct Panel {
    const void* data;
    int64_t ldb;
  };
  Panel at(int64_t k, int64_t kc, int64_t j, int64_t N, int64_t K, const GemmKernels& g,
           void* edge) const {
    if (quantized) {
      weights->to_floats(quantized->panel(j), k, kc, static_cast<float*>(edge));
      return {edge, g.NR};
    }
    if (!direct) {
      return {packed + panel_offset(k, j - origin, words_of(K, g), g.NR) * g.b_bytes, g.NR};
    }
    if (j + g.NR <= N)
      return {static_cast<const uint32_t*>(direct->data) + k * direct->row + j, direct->row};
    g.pack_b(*direct, j, int(N - j), k, kc, K, edge);  // the ragged last panel
    return {edge, g.NR};
  }
};

// One task: rows [i0, i0 + mc), columns [j0, j0 + nt) of the output.
void compute_block(const Gemm& p, const GemmKernels& g, const PanelSource& b, int64_t i0,
                   int64_t mc, int64_t j0, int64_t nt) {
  const int64_t KW = words_of(p.K, g);
  const int64_t rows = divide_up(mc, g.MR), cols = divide_up(nt, g.NR),
                tile_words = int64_t(g.MR) * g.NR;
  const int64_t kc_max = std::min<int64_t>(g.KC, KW);
  const bool one_block = KW <= g.KC;
  const Scratch a_block((rows * g.MR * kc_max + kSlack) * 4);
  const Scratch sums((one_block ? 1 : rows * cols) * tile_words * 4);
  const Scratch tile(tile_words * 4);
  const Scratch edge(b.direct || b.quantized ? (kc_max * g.NR + kSlack) * 4 : 0);
  const double block_ns = 0.04 * double(rows * cols * tile_words) * double(kc_max);
  const bool few = b.quantized && rows == 1 && mc <= b.weights->few;  // no panel in between

  for (int64_t k = 0; k == 0 || k < KW; k += g.KC) {
    const int64_t kc = std::min<int64_t>(g.KC, KW - k);
    const bool last = k + g.KC >= KW;
    for (int64_t r = 0; r < rows; ++r) {
      const int mr = int(std::min<int64_t>(g.MR, mc - r * g.MR));
      g.pack_a(p.a, i0 + r * g.MR, mr, k, kc, p.K, a_block.as<uint32_t>() + r * g.MR * kc);
    }
    for (int64_t c = 0; c < cols; ++c) {
      const int64_t j = j0 + c * g.NR;
      const int nr = int(std::min<int64_t>(g.NR, j0 + nt - j));
      const auto panel = few ? PanelSource::Panel{} : b.at(k, kc, j, p.N, p.K, g, edge.as<void>());
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t i = i0 + r * g.MR;
        const int mr = int(std::min<int64_t>(g.MR, i0 + mc - i));
        const uint32_t* rows_of_a = a_block.as<uint32_t>() + r * g.MR * kc;
        if (few) {
          b.weights->tile(mr, kc, rows_of_a, b.quantized->panel(j), k, tile.as<void>());
        } else {
          g.tile(mr, kc, rows_of_a, panel.data, panel.ldb, tile.as<void>());
        }
        if (one_block) {
          g.store(tile.as<void>(), i, mr, j, nr, p.epilogue);
          continue;
        }
        uint32_t* sum = sums.as<uint32_t>() + (c * rows + r) * tile_words;
        g.add_tile(k == 0, tile.as<void>(), sum);
        if (last) g.store(sum, i, mr, j, nr, p.epilogue);
      }
    }
    poll_after(block_ns);  // K may be as long as a caller likes
  }
}

bool reads_in_place(const Gemm& p, const GemmKernels& g) {
  return !p.packed && p.M <= kFewRows && p.b.col == 1 && p.b.dtype == DType::f32 &&
         g.k_per_word == 1;
}

// How the output is cut into tasks: blocks as large as the caches allow, but two for each of the
// `parts` threads, so that one which wakes late still finds work, and however large K is, short
// enough that Ctrl-C need not wait. Register tiles are dealt
// out evenly: blocks differ by at most one row and one column of tiles.
struct Blocking {
  int64_t row_tiles, col_tiles;    // of the whole output
  int64_t row_blocks, col_blocks;  // tasks

  // Rounded up: the larger blocks come first, so that the last ones to finish are small.
  static int64_t begin(int64_t tiles, int64_t blocks, int64_t t) {
    return divide_up(tiles * t, blocks);
  }
};
Blocking choose_blocking(int64_t M, int64_t nc, int64_t KW, const GemmKernels& g, int64_t parts) {
  int64_t row_blocks = divide_up(M, kMC), col_blocks = divide_up(nc, kNT);
  if (parts > 1 && row_blocks * col_blocks % (2 * parts) != 0) {
    if (M >= parts * 4 * g.MR) {
      row_blocks = round_up(row_blocks, 2 * parts);
    } else {
      col_blocks = round_up(col_blocks, parts);
    }
  }
  const int64_t row_tiles = divide_up(M, g.MR), col_tiles = divide_up(nc, g.NR);
  int64_t rows = divide_up(row_tiles, row_blocks), cols = divide_up(col_tiles, col_blocks);
  const int64_t tiles = std::max<int64_t>(1, kTaskWork / std::max<int64_t>(KW, 1) / g.MR);
  cols = std::clamp<int64_t>(tiles / rows, 1, cols);
  rows = std::clamp<int64_t>(tiles / cols, 1, rows);
  return {row_tiles, col_tiles, divide_up(row_tiles, rows), divide_up(col_tiles, cols)};
}

void run_gemm(const Gemm& p, const GemmKernels& g, bool parallel) {
  if (p.M == 0 || p.N == 0) return;
  const int64_t KW = words_of(p.K, g);
  const bool direct = reads_in_place(p, g), by_groups = p.weights && g.k_per_word > 1;
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
      source.quantized = p.packed, source.weights = p.weights;
    } else if (p.packed) {
      source.packed = p.packed->data();
    } else {
      pack_columns(p.b, p.K, jc, nc, g, packed.as<char>(), parallel);
      source.packed = packed.as<char>(), source.origin = jc;
    }
    const Blocking blocks = choose_blocking(p.M, nc, KW, g, parallel ? num_threads() : 1);
    const auto task = [&](int64_t t) {
      const int64_t r = t % blocks.row_blocks, c = t / blocks.row_blocks;
      const auto row = [&](int64_t block) {
        return std::min(p.M, g.MR * Blocking::begin(blocks.row_tiles, blocks.row_blocks, block));
      };
      const auto col = [&](int64_t block) {
        return std::min(nc, g.NR * Blocking::begin(blocks.col_tiles, blocks.col_blocks, block));
      };
      const int64_t mc = row(r + 1) - row(r), nt = col(c + 1) - col(c);
      if (by_groups) return cpu::multiply_groups(p, g, row(r), mc, jc + col(c), nt);
      compute_block(p, g, source, row(r), mc, jc + col(c), nt);
    };
    const int64_t tasks = blocks.row_blocks * blocks.col_blocks;
    if (parallel) {
      const double flops_per_ns = 50;
      const auto K = double(std::max<int64_t>(p.K, 1));  // without any, there is still a store
      parallel_for(tasks, 2.0 * double(p.M) * double(nc) * K / flops_per_ns, task);
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
                           const char* level)
    : K(k), N(n), dtype(b.dtype), isa(level) {
  allocate(packed_bytes(words_of(K, g), N, g));
  pack_columns(b, K, 0, N, g, data_.get(), true);
}

void PackedMatrix::allocate(int64_t bytes) {
  bytes_ = (bytes + 63) & ~int64_t(63);
  data_.reset(static_cast<char*>(std::aligned_alloc(64, size_t(bytes_))));
  if (!data_) throw std::bad_alloc();
}

void describe(const Gemm& p, const GemmKernels& g) {
  const bool integers = g.k_per_word > 1, direct = reads_in_place(p, g);
  if (integers) {
    Trace::kernel(p.weights ? "gemm_s8_groups" : p.packed ? "gemm_s8_packed" : "gemm_s8");
  } else {
    Trace::kernel(p.weights  ? "gemm_f32_int_weights"
                  : p.packed ? "gemm_f32_packed"
                  : direct   ? "gemm_f32_in_place"
                             : "gemm_f32");
  }
  if (!Trace::described()) return;
  const Blocking blocks = choose_blocking(p.M, p.N, words_of(p.K, g), g, num_threads());
  Trace::detail("tile", std::to_string(g.MR) + " x " + std::to_string(g.NR) +
                            " in registers, K in blocks of " + std::to_string(g.KC * g.k_per_word));
  Trace::detail("blocks", std::to_string(blocks.row_blocks) + " x " +
                              std::to_string(blocks.col_blocks) + " of the output, at most " +
                              std::to_string(kMC) + " x " + std::to_string(kNT));
  if (direct) Trace::note("b is read where it is: few rows, and its rows are contiguous");
  if (!direct && !p.packed) Trace::note("b is packed in every call: tw.pack(b) does it once");
  if (!integers && precision() != Precision::highest) {
    Trace::note(std::string("precision ") + precision_name(precision()) +
                ": no level of this build multiplies float32 faster and less exactly; this is the "
                "kernel of highest");
  }
  if (!batch_invariant()) {
    Trace::note("batch_invariant=False: no kernel of this build uses the permission");
  }
}

void gemm(const Gemm& p, const GemmKernels& g) {
  run_gemm(p, g, true);
}
void gemm_serial(const Gemm& p, const GemmKernels& g) {
  run_gemm(p, g, false);
}

}  // namespace tilewright
