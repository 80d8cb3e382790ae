// Rows of a table by id, and the gradient of the table:
//
//     y[i] = table[ids[i]]                   dtable[v] = sum of dy[i] over the places i of v
//
// ids: (n,) int32 or int64; table, dtable: (V, C); y, dy: (n, C); any strides. An id outside [0, V)
// makes its row of y NaN, and has no part in the gradient.
//
// Forward: a team of threads (team.h) copies a row, bound by memory.
//
// Backward: places are sorted by id, so that one team adds up each row of dtable, in ascending order
// of places: the bits don't depend on who ran first, and no float is added atomically.
//
//     count     how often each id occurs         (V,)   integer atomics
//     scan      where the places of an id start  (V,)   one block, each thread a stretch of ids
//     place     ids to their stretches           (n,)   integer atomics: in any order
//     rank      each stretch put in order        (n,)   a place's rank: how many are smaller
//     sum       dtable                           (V, C) a team a row
//
// An id that occurs k times costs k^2 comparisons in `rank`, spread over k threads that read the same
// line: little for text, much for one id that fills a batch. Sorting by digits would cost all ids six
// passes more.
//
// Numerics: sums are float32, in one chain, rounded once at the end.
#include "cuda/each.h"
#include "cuda/ids.h"
#include "cuda/kernels.h"
#include "cuda/team.h"

namespace tilewright::cuda {
namespace {

using Place = unsigned long long;  // what atomicAdd takes

constexpr int kScanThreads = 1024;  // the most a block has: only one of them scans

struct ScanShared {
  Place sum[kScanThreads];
};

template <class Team, class Element>
__global__ void embedding_forward_kernel(Array ids, Rows table, Rows y, std::int64_t n,
                                         std::int64_t V, std::int64_t C) {
  const std::int64_t r = Team::row();
  if (r >= n) return;
  const std::int64_t id = load_id(ids, ids.offset(r)), to = y.row(r);
  const bool found = names(id, V);
  const std::int64_t from = found ? table.row(id) : 0;
  for (std::int64_t c = Team::thread(); c < C; c += Team::kThreads) {
    y.store<Element>(to + c * y.step, found ? table.load<Element>(from + c * table.step) : NAN);
  }
}

__global__ void clear_kernel(Place* counts, std::int64_t V) {
  const std::int64_t v = each_index();
  if (v < V) counts[v] = 0;
}

__global__ void count_kernel(Array ids, Place* counts, std::int64_t n, std::int64_t V) {
  const std::int64_t i = each_index();
  if (i >= n) return;
  const std::int64_t id = load_id(ids, ids.offset(i));
  if (names(id, V)) atomicAdd(&counts[id], 1);
}

// starts[v] = the sum of counts before v; starts[V] = that of all. ends[v] = starts[v], to be
// counted up by place_kernel.
__global__ void scan_kernel(const Place* counts, Place* starts, Place* ends, std::int64_t V) {
  Place* const sum = gpu::shared_memory<ScanShared>().sum;
  const int t = static_cast<int>(threadIdx.x);
  const std::int64_t each = (V + kScanThreads - 1) / kScanThreads;
  const std::int64_t first = min(V, t * each), last = min(V, first + each);
  Place own = 0;
  for (std::int64_t v = first; v < last; ++v) own += counts[v];
  sum[t] = own;
  __syncthreads();
  for (int d = 1; d < kScanThreads; d *= 2) {  // Hillis & Steele: sum[t] of 2d threads up to t
    const Place before = t >= d ? sum[t - d] : 0;
    __syncthreads();
    sum[t] += before;
    __syncthreads();
  }
  Place at = sum[t] - own;
  for (std::int64_t v = first; v < last; ++v) {
    starts[v] = ends[v] = at;
    at += counts[v];
  }
  if (t == kScanThreads - 1) starts[V] = at;
}

__global__ void place_kernel(Array ids, Place* ends, Place* places, std::int64_t n,
                             std::int64_t V) {
  const std::int64_t i = each_index();
  if (i >= n) return;
  const std::int64_t id = load_id(ids, ids.offset(i));
  if (names(id, V)) places[atomicAdd(&ends[id], 1)] = static_cast<Place>(i);
}

__global__ void rank_kernel(Array ids, const Place* starts, const Place* places, Place* sorted,
                            std::int64_t V) {
  const Place k = static_cast<Place>(each_index());
  if (k >= starts[V]) return;
  const Place own = places[k];
  const std::int64_t id = load_id(ids, ids.offset(static_cast<std::int64_t>(own)));
  Place rank = starts[id];
  for (Place other = starts[id]; other < starts[id + 1]; ++other) rank += places[other] < own;
  sorted[rank] = own;
}

template <class Team, class Element>
__global__ void embedding_backward_kernel(const Place* starts, const Place* sorted, Rows dy,
                                          Rows dtable, std::int64_t V, std::int64_t C) {
  const std::int64_t v = Team::row();
  if (v >= V) return;
  const std::int64_t to = dtable.row(v);
  for (std::int64_t c = Team::thread(); c < C; c += Team::kThreads) {
    float sum = 0;
    for (Place k = starts[v]; k < starts[v + 1]; ++k) {
      sum += dy.load<Element>(dy.row(static_cast<std::int64_t>(sorted[k])) + c * dy.step);
    }
    dtable.store<Element>(to + c * dtable.step, sum);
  }
}

}  // namespace

void embedding_forward(const EmbeddingForward& op) {
  const std::int64_t n = op.ids.size(), V = op.table.shape[0], C = op.table.shape[1];
  with_team(C, [&](auto team) {
    with_element({&op.table, &op.y}, [&](auto element) {
      using T = decltype(team);
      launch_rows<T>("embedding_forward", embedding_forward_kernel<T, decltype(element)>, n,
                     array_of(op.ids), rows_of(op.table), rows_of(op.y), n, V, C);
    });
  });
}

void embedding_backward(const EmbeddingBackward& op) {
  const std::int64_t n = op.ids.size(), V = op.dtable.shape[0], C = op.dtable.shape[1];
  const Array ids = array_of(op.ids);
  const gpu::Workspace room(sizeof(Place) * static_cast<std::size_t>(3 * V + 1 + 2 * n));
  Place* const counts = room.as<Place>();
  Place *const ends = counts + V, *const starts = ends + V;
  Place *const places = starts + V + 1, *const sorted = places + n;
  launch_each("embedding_clear", clear_kernel, V, counts, V);
  if (n > 0) launch_each("embedding_count", count_kernel, n, ids, counts, n, V);
  gpu::launch("embedding_scan", scan_kernel, dim3(1), dim3(kScanThreads), sizeof(ScanShared),
              gpu::current_stream(), counts, starts, ends, V);
  if (n > 0) {
    launch_each("embedding_place", place_kernel, n, ids, ends, places, n, V);
    launch_each("embedding_rank", rank_kernel, n, ids, starts, places, sorted, V);
  }
  with_team(C, [&](auto team) {
    with_element({&op.dy, &op.dtable}, [&](auto element) {
      using T = decltype(team);
      launch_rows<T>("embedding_backward", embedding_backward_kernel<T, decltype(element)>, V,
                     starts, sorted, rows_of(op.dy), rows_of(op.dtable), V, C);
    });
  });
}

}  // namespace tilewright::cuda
