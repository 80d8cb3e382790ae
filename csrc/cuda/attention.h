// Attention on the GPU: what its forward and backward kernels share about the problem. Which rows and
// keys a block has, what a row sees, and how q . k becomes a score; nothing here knows how products
// are made (attention_products.h).
//
//   unit        a sequence's key/value head with the query heads of its group
//   row tile    up to M query rows of a unit: of one head, or of several heads where each has few
//               rows (a decode step loads K and V once for the whole group)
//   chunk       512 keys, counted from the sequence's first: a row's result is defined as
//               state = chunk 0 (+) chunk 1 (+) ..., so prefill, decode and varlen agree bit by bit
//
// Sequences are a batch, or lie one after the other (varlen). Then only the device knows where they
// begin, and no sum of tiles is at hand; a sequence gets ends[i] / M + i as its first slot, which
// leaves room for all its tiles before the next one's. Blocks of slots too many leave at once.
//
// What the device reads as lengths and offsets is clamped to the arrays: bad ones give wrong rows,
// never an access outside.
#pragma once
#include <algorithm>

#include "cuda/array.h"
#include "cuda/philox.h"
#include "tilewright/ops.h"

namespace tilewright::cuda::attention {

constexpr int kChunk = 512;
constexpr float kLog2E = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;
constexpr std::int64_t kNowhere = INT64_MIN;  // the place of a line that does not exist

// Where the pages of a KVCache begin, for each sequence, in elements from an operand's data.
struct Pages {
  const std::int64_t* first = nullptr;
  std::int64_t stride = 0;  // pages of a sequence
  int tokens = 1;           // of a page
};

// (B, H, T, D), or (B, H, T) with an element for each row. In pages, the strides are those of a page.
struct Operand : Array {
  bool vectors = false;  // its rows can be read and written 16 bytes at a time
  Pages pages;

  __device__ std::int64_t row(std::int64_t batch, std::int64_t head, std::int64_t t) const {
    return batch * stride[0] + head * stride[1] + t * stride[2];
  }
  __device__ float element(std::int64_t at) const { return load<Mixed>(at); }
};

inline Operand operand_of(const View& v) {
  Operand o;
  if (!v) return o;
  o.data = v.data, o.dtype = v.dtype, o.axes = v.rank;
  const std::int64_t size = dtype_size(v.dtype), last = v.rank - 1;
  o.vectors = v.shape[last] > 0 && v.shape[last] * size % 16 == 0 && v.stride[last] == 1 &&
              reinterpret_cast<std::uintptr_t>(v.data) % 16 == 0;
  for (int d = 0; d < v.rank; ++d) {
    o.shape[d] = v.shape[d], o.stride[d] = v.stride[d];
    o.vectors = o.vectors && (d == last || v.shape[d] == 1 || v.stride[d] * size % 16 == 0);
  }
  return o;
}

// int32 or int64 on the device.
struct Integers {
  const void* data = nullptr;
  bool wide = false;
  std::int64_t stride = 0, count = 0;

  __host__ __device__ explicit operator bool() const { return data != nullptr; }
  __device__ std::int64_t operator[](std::int64_t i) const {
    return wide ? static_cast<const std::int64_t*>(data)[i * stride]
                : static_cast<const std::int32_t*>(data)[i * stride];
  }
};

inline Integers integers_of(const View& v) {
  if (!v) return {};
  return {v.data, v.dtype == DType::s64, v.stride[0], v.shape[0]};
}

__device__ inline std::int64_t clamp(std::int64_t x, std::int64_t low, std::int64_t high) {
  return x < low ? low : x > high ? high : x;
}

// Where the keys of a head begin in x, and those of its sequence's pages if there are any.
struct KeyPlaces {
  std::int64_t head, step;
  const std::int64_t* pages;
  int tokens;

  __device__ KeyPlaces(const Operand& x, std::int64_t batch, std::int64_t head_kv,
                       std::int64_t first)
      : head(x.pages.first ? head_kv * x.stride[1] : x.row(batch, head_kv, first)),
        step(x.stride[2]),
        pages(x.pages.first ? x.pages.first + batch * x.pages.stride : nullptr),
        tokens(x.pages.tokens) {}
  __device__ std::int64_t operator()(int key) const {
    if (!pages) return head + key * step;
    return pages[key / tokens] + head + key % tokens * step;
  }
};

struct Problem {
  Operand q, k, v;               // (B, H, Tq, D), (B, Hkv, Tk, D), (B, Hkv, Tk, Dv); varlen: B is 1
  Operand mask;                  // (B, H, Tq, Tk) by strides that may be 0; optional
  Integers lengths;              // (B,) keys that exist; optional
  Integers ends_q, ends_k;       // varlen: (sequences + 1,)
  const float* slopes;           // ALiBi; optional
  std::int64_t slope_stride[2];  // of sequence and head
  std::int64_t sequences, rows, keys;  // Tq and Tk; varlen: those of all sequences
  int heads, heads_kv, dims, dims_v;
  std::int64_t left, right;  // keys seen before and after a row's own position; negative: all
  float scale;               // of q . k; for the softcap's argument already divided by it
  float softcap;             // 0: none
  Dropping dropping;

  __host__ __device__ bool varlen() const { return static_cast<bool>(ends_q); }
  __host__ __device__ int group() const { return heads / heads_kv; }
};

struct Sequence {
  std::int64_t number, batch;    // of slopes; of the arrays' first axis
  std::int64_t first_row, rows;  // in q
  std::int64_t first_key, keys;  // in k and v
  std::int64_t length;           // keys that exist
  std::uint64_t element;         // number of its first weight, for dropout
};

__device__ inline Sequence sequence_at(const Problem& p, std::int64_t i) {
  if (!p.varlen()) {
    const std::int64_t length = p.lengths ? clamp(p.lengths[i], 0, p.keys) : p.keys;
    const std::uint64_t weights = static_cast<std::uint64_t>(p.heads * p.rows) * p.keys;
    return {i, i, 0, p.rows, 0, p.keys, length, i * weights};
  }
  const std::int64_t q = clamp(p.ends_q[i], 0, p.rows), k = clamp(p.ends_k[i], 0, p.keys);
  const std::int64_t rows = clamp(p.ends_q[i + 1], q, p.rows) - q;
  const std::int64_t keys = clamp(p.ends_k[i + 1], k, p.keys) - k;
  std::uint64_t element = 0;
  if (p.dropping) {  // the sequences before, shared by the lanes of each warp
    for (std::int64_t j = threadIdx.x % 32; j < i; j += 32) {
      element += static_cast<std::uint64_t>(p.heads * (p.ends_q[j + 1] - p.ends_q[j])) *
                 static_cast<std::uint64_t>(p.ends_k[j + 1] - p.ends_k[j]);
    }
    for (int d = 16; d; d /= 2) element += __shfl_xor_sync(kAllLanes, element, d);
  }
  return {i, 0, q, rows, k, keys, keys, element};
}

// --- who does what: slots, tiles, units

// Slots of tiles of `size` rows (or keys) of all sequences.
inline std::int64_t slots_for(const Problem& p, std::int64_t total, int size) {
  return p.varlen() ? total / size + p.sequences : p.sequences * ((total + size - 1) / size);
}

struct Slot {
  Sequence sequence;
  std::int64_t tile;  // of the sequence; where it has no such tile there is nothing to do
};

// The last tiles of a sequence come first: under a causal mask they have the most to do.
__device__ inline Slot slot_at(const Problem& p, const Integers& ends, std::int64_t total, int size,
                               std::int64_t slot) {
  if (!p.varlen()) {
    const std::int64_t tiles = (total + size - 1) / size;
    return {sequence_at(p, slot / tiles), tiles - 1 - slot % tiles};
  }
  std::int64_t low = 0, high = p.sequences;  // the last sequence whose first slot is not beyond
  while (high - low > 1) {
    const std::int64_t middle = (low + high) / 2;
    (clamp(ends[middle], 0, total) / size + middle <= slot ? low : high) = middle;
  }
  return {sequence_at(p, low), slot - (clamp(ends[low], 0, total) / size + low)};
}

// How the rows of a unit are cut into tiles of at most M.
struct RowTiles {
  int heads_per_tile;     // 1 unless a head has few rows
  std::int64_t per_head;  // 1 where heads_per_tile > 1
  std::int64_t count;

  __host__ __device__ RowTiles(std::int64_t rows, int group, int M) {
    heads_per_tile = rows == 0 || rows > M / 2 ? 1 : static_cast<int>(M / rows);
    if (heads_per_tile > group) heads_per_tile = group > 0 ? group : 1;
    per_head = (rows + M - 1) / M;
    count = (group + heads_per_tile - 1) / heads_per_tile * per_head;
  }
};

// Keys [begin, end) of a sequence.
struct Keys {
  int begin, end;

  __device__ bool meet(int first, int last) const { return begin < last && first < end; }
  __device__ bool hold(int first, int last) const { return begin <= first && last <= end; }
};

__device__ inline Keys seen_by_row(const Problem& p, const Sequence& s, std::int64_t row) {
  const std::int64_t own = row + s.length - s.rows;
  return {p.left < 0 ? 0 : static_cast<int>(clamp(own - p.left, 0, s.length)),
          static_cast<int>(p.right < 0 ? s.length : clamp(own + p.right + 1, 0, s.length))};
}

struct RowTile {
  Sequence sequence;
  int head, heads;         // of q, from the first on
  std::int64_t first_row;  // of each of these heads
  int rows;

  // Tile `tile` of each of the unit's heads, or of its heads `part` * heads_per_tile and on.
  __device__ RowTile(const Problem& p, const Sequence& s, int head_kv, std::int64_t tile, int part,
                     int M)
      : sequence(s) {
    const RowTiles tiles(s.rows, p.group(), M);
    const int first = part * tiles.heads_per_tile;
    head = head_kv * p.group() + first;
    heads = max(0, min(tiles.heads_per_tile, p.group() - first));
    first_row = tile * M;
    rows = static_cast<int>(clamp(s.rows - first_row, 0, M));
  }
  __device__ int count() const { return heads * rows; }
  __device__ int head_of(int r) const { return heads == 1 ? head : head + r / rows; }
  __device__ std::int64_t row_of(int r) const { return first_row + (heads == 1 ? r : r % rows); }
  // Keys that some of its rows see by position, and keys that all of them do.
  __device__ Keys any(const Problem& p) const {
    return {seen_by_row(p, sequence, first_row).begin,
            seen_by_row(p, sequence, first_row + rows - 1).end};
  }
  __device__ Keys all(const Problem& p) const {
    return {seen_by_row(p, sequence, first_row + rows - 1).begin,
            seen_by_row(p, sequence, first_row).end};
  }
  // Where row r lies in x.
  __device__ std::int64_t at(const Operand& x, int r) const {
    if (r >= count()) return kNowhere;
    return x.row(sequence.batch, head_of(r), sequence.first_row + row_of(r));
  }
};

// How blocks of row tiles are counted: slots, parts of a group's heads, key/value heads, chunks.
struct Grid {
  std::int64_t slots = 0;
  int parts = 0;
  int chunks = 0;            // 0: a block takes all of them
  float* partial = nullptr;  // what a split's blocks leave

  Grid() = default;
  Grid(const Problem& p, int M) : slots(slots_for(p, p.rows, M)), parts(p.group()) {
    if (p.varlen()) return;  // where only the device knows how many rows a sequence has
    const RowTiles tiles(p.rows, p.group(), M);
    parts = static_cast<int>(tiles.count / tiles.per_head);
  }
  std::int64_t blocks(int heads_kv) const { return slots * parts * heads_kv; }
};

struct Job {
  std::int64_t number;  // of its row tile
  int chunk, head_kv;
  RowTile tile;

  __device__ static Job at(const Problem& p, const Grid& grid, int M) {
    const std::int64_t block = blockIdx.x, part = block / grid.slots;
    const std::int64_t head = part / grid.parts, jobs = grid.slots * grid.parts * p.heads_kv;
    const Slot slot = slot_at(p, p.ends_q, p.rows, M, block % grid.slots);
    const int head_kv = static_cast<int>(head % p.heads_kv);
    return {block % jobs, static_cast<int>(block / jobs), head_kv,
            RowTile(p, slot.sequence, head_kv, slot.tile, static_cast<int>(part % grid.parts), M)};
  }
};

// What every thread of a block has found, from memory that they share from then on: registers are for
// sums. With a barrier.
template <class X>
__device__ const X& shared_by_all(X& memory, const X& found) {
  if (threadIdx.x == 0) memory = found;
  __syncthreads();
  return memory;
}

// --- what a row brings to its scores, for the rows of a tile, in shared memory

template <int M>
struct RowTable {
  int begin[M], end[M];  // keys that it sees by position: none in places without a row
  int position[M];       // among the keys, for ALiBi
  float slope[M];
  std::int64_t mask[M];      // where the mask's row begins
  std::uint64_t element[M];  // number of the weight of key 0

  // By threads [0, M); a barrier must follow.
  __device__ void fill(const Problem& p, const RowTile& tile) {
    const int r = static_cast<int>(threadIdx.x);
    if (r >= M) return;
    const Sequence& s = tile.sequence;
    const bool exists = r < tile.count();
    const std::int64_t row = exists ? tile.row_of(r) : 0;
    const int head = exists ? tile.head_of(r) : 0;
    const Keys seen = seen_by_row(p, s, row);
    begin[r] = exists ? seen.begin : 0;
    end[r] = exists ? seen.end : 0;
    position[r] = static_cast<int>(row + s.length - s.rows);
    slope[r] = p.slopes ? p.slopes[s.number * p.slope_stride[0] + head * p.slope_stride[1]] : 0;
    mask[r] = p.mask ? p.mask.row(s.batch, head, row) : 0;
    element[r] = s.element + static_cast<std::uint64_t>((head * s.rows + row) * s.keys);
  }
};

// --- scores. T's tensor cores want base 2, whose exponential is one instruction; float32 keeps base
// e and the accurate function.

template <class T>
struct Base {
  static constexpr float kUnit = kLog2E;  // what natural units are multiplied by
  static constexpr float kLog = kLn2;     // and back
  __device__ static float exp(float x) { return gpu::exp2_fast(x); }
  __device__ static float log(float x) { return log2f(x); }
};
template <>
struct Base<float> {
  static constexpr float kUnit = 1.0f, kLog = 1.0f;
  __device__ static float exp(float x) { return x < -87.0f ? 0.0f : expf(x); }  // never subnormal
  __device__ static float log(float x) { return logf(x); }
};

// This thread's place in its warp, and the first of its warp's 16 lines. Taken of unsigned numbers: so
// the compiler knows their bits, and folds them into addresses.
__device__ inline int lane_id() {
  return static_cast<int>(threadIdx.x % 32);
}
__device__ inline int warp_line() {
  return static_cast<int>(threadIdx.x / 32 * 16);
}

// Row and key of an accumulator of this thread: element e of fragment n of its warp's (16, 8 n) tile,
// whose lines are rows, or keys where kTurned.
template <bool kTurned>
struct Place {
  int row, key;

  __device__ Place(int n, int e) {
    const int lane = lane_id();
    const int line = warp_line() + lane / 4 + e / 2 * 8, column = n * 8 + lane % 4 * 2 + e % 2;
    row = kTurned ? column : line;
    key = kTurned ? line : column;
  }
};

// q . k of keys from `key0` on become scores in T's base, -inf where a row does not see a key.
// `whole`: each row of the tile sees all these keys by position.
template <class T, bool kTurned, int N, int M>
__device__ void score(const Problem& p, const RowTable<M>& rows, int key0, bool whole,
                      float (&s)[N][4]) {
  using B = Base<T>;
  const float factor = p.scale * B::kUnit;
  const bool plain = p.softcap == 0 && !p.slopes && !p.mask;
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (plain && whole) {
        s[n][e] *= factor;
        continue;
      }
      const Place<kTurned> at(n, e);
      const int key = key0 + at.key;
      bool seen = rows.begin[at.row] <= key && key < rows.end[at.row];
      float t = s[n][e] * factor;
      if (p.softcap != 0) t = tanhf(s[n][e] * p.scale) * (p.softcap * B::kUnit);
      if (p.slopes) {
        const float distance = fabsf(static_cast<float>(rows.position[at.row] - key));
        t = fmaf(-rows.slope[at.row] * B::kUnit, distance, t);
      }
      if (p.mask && seen) {
        const std::int64_t place = rows.mask[at.row] + key * p.mask.stride[3];
        if (p.mask.dtype == DType::boolean) {
          seen = static_cast<const unsigned char*>(p.mask.data)[place] != 0;
        } else {
          const float bias = p.mask.element(place);
          seen = bias != -INFINITY;
          t = fmaf(bias, B::kUnit, t);
        }
      }
      s[n][e] = seen ? t : -INFINITY;
    }
  }
}

// Weights, or their gradients, as dropout leaves them: 0 where they are dropped, whatever they are.
// What is kept is found first, a bit for each, in a loop that stays one: ten rounds for every element
// side by side would need more registers than there are.
template <bool kTurned, int N, int M>
__device__ void drop(const Problem& p, const RowTable<M>& rows, int key0, float (&x)[N][4]) {
  static_assert(N <= 8, "a bit for each");
  Philox words(p.dropping);
  std::uint32_t kept = 0;
#pragma unroll 1
  for (int i = 0; i < 4 * N; ++i) {
    const Place<kTurned> at(i / 4, i % 4);
    const std::uint64_t element = rows.element[at.row] + static_cast<std::uint64_t>(key0 + at.key);
    if (words.keeps(element)) kept |= 1u << i;
  }
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      x[n][e] = kept >> (4 * n + e) & 1 ? x[n][e] * p.dropping.scale : 0.0f;
    }
  }
}

// --- a problem from the descriptors

inline void set_scores(Problem& p, const AttentionScores& s) {
  p.left = std::min<std::int64_t>(s.left, INT32_MAX);
  p.right = s.causal ? 0 : std::min<std::int64_t>(s.right, INT32_MAX);
  p.softcap = s.softcap;
  p.scale = s.softcap == 0 ? s.scale : static_cast<float>(double(s.scale) / double(s.softcap));
  p.dropping = dropping(s.dropout_p, s.seed);
  p.slopes = s.alibi_slopes ? s.alibi_slopes.ptr<float>() : nullptr;
  p.slope_stride[0] = s.alibi_slopes ? s.alibi_slopes.stride[0] : 0;
  p.slope_stride[1] = s.alibi_slopes ? s.alibi_slopes.stride[1] : 0;
}

inline void set_sizes(Problem& p) {
  p.heads = static_cast<int>(p.q.shape[1]), p.heads_kv = static_cast<int>(p.k.shape[1]);
  p.rows = p.q.shape[2], p.keys = p.k.shape[2];
  p.dims = static_cast<int>(p.q.shape[3]), p.dims_v = static_cast<int>(p.v.shape[3]);
}

// k and v: op's own, or those of its cache.
inline Problem problem_of(const Attention& op, const Operand& k, const Operand& v) {
  Problem p{};
  p.q = operand_of(op.q), p.k = k, p.v = v;
  p.mask = operand_of(op.mask);
  p.lengths = integers_of(op.kv_lengths);
  p.sequences = op.q.shape[0];
  set_sizes(p);
  set_scores(p, op.scores);
  return p;
}

inline Problem problem_of(const Attention& op) {
  return problem_of(op, operand_of(op.k), operand_of(op.v));
}

// (total, H, D) as (1, H, total, D), (H, total) as (1, H, total).
inline View as_batch(const View& v, bool heads_last) {
  if (!v) return v;
  View b = v;
  b.rank = v.rank + 1;
  for (int d = v.rank; d > 0; --d) b.shape[d] = v.shape[d - 1], b.stride[d] = v.stride[d - 1];
  b.shape[0] = 1, b.stride[0] = 0;
  if (heads_last) std::swap(b.shape[1], b.shape[2]), std::swap(b.stride[1], b.stride[2]);
  return b;
}

inline Problem problem_of(const AttentionVarlen& op) {
  Problem p{};
  p.q = operand_of(as_batch(op.q, true)), p.k = operand_of(as_batch(op.k, true));
  p.v = operand_of(as_batch(op.v, true));
  p.ends_q = integers_of(op.cu_seqlens_q), p.ends_k = integers_of(op.cu_seqlens_k);
  p.sequences = p.ends_q.count - 1;
  set_sizes(p);
  set_scores(p, op.scores);
  return p;
}

}  // namespace tilewright::cuda::attention
