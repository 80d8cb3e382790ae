// A KVCache's pages in a GPU's memory: allocating, filling and finding them. Which pages there are is
// known on the host (KVCache), as on the CPU; only their contents are here.
//
//   append   tokens of k and v -> | K: (heads, page, D) | V: the same | scales of int8 |
//   attend   the table of pages is written by launches whose parameters hold it: no copy that the
//            host would have to wait for, and no state that a stream could see too early
//
// A launch fills up to kPieces pages, or the table with up to kWords words: both are kernel
// parameters, of at most 4 KiB. A block is a head of K or V in a page, its warps take a row each in
// turns: a row's largest magnitude, for the scale of int8, then needs no more than shuffles. Bound by
// memory; a decode step, of one row, by the launch.
//
// Numerics: as on the CPU, bit by bit: floats are rounded to the nearest even, int8 has a scale
// amax / 127 for each row (levels.h).
//
// Method: Kwon et al. (2023), PagedAttention.
#include <algorithm>
#include <vector>

#include "core/kvpages.h"
#include "cuda/elements.h"
#include "cuda/kernels.h"
#include "cuda/kvcache.h"
#include "cuda/levels.h"
#include "cuda/team.h"

namespace tilewright::cuda {
namespace {

constexpr unsigned kWarps = 4;
constexpr int kPieces = 64, kWords = 256;

// Rows of a page that an append writes: [first, first + count) from token `token` of sequence `batch`
// on, and those before them from the page that is shared, if there is one.
struct Piece {
  char* page;
  const char* shared;
  int batch, token, first, count;
};
struct Pieces {
  Piece piece[kPieces];
};
struct Words {
  std::int64_t word[kWords];
};

// A head's rows of K or of V in a page, and their scales.
struct Place {
  std::int64_t data, scale;  // bytes from the page's begin to the head's first ones
  std::int64_t dims;
  DType dtype;

  __device__ Place(const PagedKeys& k, bool value, std::int64_t head)
      : data(value ? k.value : 0),
        scale((value ? k.scale[1] : k.scale[0]) + head * k.tokens * 4),
        dims(k.dims),
        dtype(k.dtype) {
    data += head * k.tokens * dims * (dtype == DType::f32 ? 4 : dtype == DType::s8 ? 1 : 2);
  }
  template <class T>
  __device__ T* row(char* page, std::int64_t row) const {
    return reinterpret_cast<T*>(page + data) + row * dims;
  }
  template <class T>
  __device__ const T* row(const char* page, std::int64_t row) const {
    return reinterpret_cast<const T*>(page + data) + row * dims;
  }
  __device__ float& scale_of(char* page, std::int64_t row) const {
    return reinterpret_cast<float*>(page + scale)[row];
  }
  __device__ float scale_of(const char* page, std::int64_t row) const {
    return reinterpret_cast<const float*>(page + scale)[row];
  }
};

__device__ inline int lane() {
  return static_cast<int>(threadIdx.x % 32);
}

template <class T>
__device__ void copy_row(const Place& at, const char* from, char* to, int row) {
  const T* const source = at.row<T>(from, row);
  T* const target = at.row<T>(to, row);
  for (std::int64_t d = lane(); d < at.dims; d += 32) gpu::store(target + d, source[d]);
}

__device__ inline void copy_row(const Place& at, const char* from, char* to, int row) {
  if (at.dtype == DType::f32) return copy_row<float>(at, from, to, row);
  if (at.dtype != DType::s8) return copy_row<std::uint16_t>(at, from, to, row);
  copy_row<std::uint8_t>(at, from, to, row);
  if (lane() == 0) at.scale_of(to, row) = at.scale_of(from, row);
}

// `step`: between the row's elements of x, which begins at `from`.
__device__ inline void store_row(const Place& at, const Array& x, std::int64_t from,
                                 std::int64_t step, char* page, int row) {
  if (at.dtype != DType::s8) {
    for (std::int64_t d = lane(); d < at.dims; d += 32) {
      put_float(page + at.data, row * at.dims + d, at.dtype, x.load<Mixed>(from + d * step));
    }
    return;
  }
  float amax = 0;
  for (std::int64_t d = lane(); d < at.dims; d += 32) {
    amax = larger(fabsf(x.load<Mixed>(from + d * step)), amax);
  }
  for (int d = 16; d; d /= 2) amax = larger(amax, __shfl_xor_sync(kAllLanes, amax, d));
  const float scale = scale_of(amax, 127.0f);
  auto* const q = at.row<std::int8_t>(page, row);
  for (std::int64_t d = lane(); d < at.dims; d += 32) {
    q[d] = static_cast<std::int8_t>(
        round_to_level(x.load<Mixed>(from + d * step), scale, -127.0f, 127.0f));
  }
  if (lane() == 0) at.scale_of(page, row) = scale;
}

// k, v: (B, heads, T, D) with all their axes.
__global__ void append_kernel(const __grid_constant__ Pieces pieces,
                              const __grid_constant__ PagedKeys layout,
                              const __grid_constant__ Array k, const __grid_constant__ Array v) {
  const std::int64_t head = blockIdx.x % layout.heads, rest = blockIdx.x / layout.heads;
  const Piece& piece = pieces.piece[rest / 2];
  const bool value = rest % 2 != 0;
  const Place at(layout, value, head);
  const Array& x = value ? v : k;
  const std::int64_t start = piece.batch * x.stride[0] + head * x.stride[1];
  const int warp = static_cast<int>(threadIdx.x / 32), end = piece.first + piece.count;
  for (int row = piece.shared ? warp : piece.first + warp; row < end; row += kWarps) {
    if (row < piece.first) {
      copy_row(at, piece.shared, piece.page, row);
    } else {
      const std::int64_t token = piece.token + row - piece.first;
      store_row(at, x, start + token * x.stride[2], x.stride[3], piece.page, row);
    }
  }
}

__global__ void table_kernel(const __grid_constant__ Words words, int count, std::int64_t* to) {
  const int i = static_cast<int>(threadIdx.x);
  if (i < count) to[i] = words.word[i];
}

// A warp for each row of K and of V: (value, B, heads, longest).
__global__ void widen_kernel(const char* some, const std::int64_t* pages, std::int64_t stride,
                             const __grid_constant__ PagedKeys layout, std::int64_t longest,
                             std::int64_t rows, float* to) {
  const std::int64_t i = std::int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (i >= 2 * rows) return;
  const std::int64_t token = i % longest, head = i / longest % layout.heads;
  const std::int64_t b = i % rows / longest / layout.heads;
  const char* const page = some + pages[b * stride + token / layout.tokens];
  const Place at(layout, i >= rows, head);
  const std::int64_t row = token % layout.tokens;
  const auto* const q = at.row<std::int8_t>(page, row);
  const float scale = at.scale_of(page, row);
  for (std::int64_t d = lane(); d < at.dims; d += 32) {
    to[i * at.dims + d] = scale * static_cast<float>(q[d]);
  }
}

Array all_axes(const View& v) {
  Array a;
  a.data = v.data, a.dtype = v.dtype, a.axes = v.rank;
  for (int d = 0; d < v.rank; ++d) a.shape[d] = v.shape[d], a.stride[d] = v.stride[d];
  return a;
}

View keys_view(void* data, DType dtype, std::initializer_list<std::int64_t> shape) {
  View v;
  v.data = data, v.dtype = dtype, v.present = true, v.device = Device::gpu;
  std::int64_t stride = 1;
  for (const std::int64_t extent : shape) v.shape[v.rank++] = extent;
  for (int d = v.rank - 1; d >= 0; --d) v.stride[d] = stride, stride *= v.shape[d];
  return v;
}

}  // namespace

Memory allocate(std::int64_t bytes) {
  const gpu::Stream stream = gpu::current_stream();
  return {static_cast<char*>(gpu::allocate(static_cast<std::size_t>(bytes), stream)), stream};
}

void release(const Memory& memory) {
  gpu::release(memory.data, static_cast<gpu::Stream>(memory.stream));
}

void fill_pages(const KVCache::Append& append, const PagedKeys& layout, const View& k,
                const View& v) {
  std::vector<Piece> pieces;
  for (std::size_t b = 0; b < append.sequences.size(); ++b) {
    const KVCache::Append::Sequence& s = append.sequences[b];
    std::int64_t token = 0;
    for (std::size_t j = 0; j < s.pages.size(); ++j) {
      const std::int64_t first = j == 0 ? s.length % layout.tokens : 0;
      const std::int64_t count = std::min(layout.tokens - first, append.tokens - token);
      pieces.push_back({s.pages[j].get(), j == 0 ? s.shared.get() : nullptr, static_cast<int>(b),
                        static_cast<int>(token), static_cast<int>(first), static_cast<int>(count)});
      token += count;
    }
  }
  for (std::size_t begin = 0; begin < pieces.size(); begin += kPieces) {
    const std::size_t count = std::min<std::size_t>(pieces.size() - begin, kPieces);
    Pieces some{};
    std::copy_n(pieces.begin() + static_cast<std::ptrdiff_t>(begin), count, some.piece);
    gpu::launch("kvcache_append", append_kernel,
                dim3(static_cast<unsigned>(count * 2) * static_cast<unsigned>(layout.heads)),
                dim3(32 * kWarps), 0, gpu::current_stream(), some, layout, all_axes(k),
                all_axes(v));
  }
}

CachedKeys::CachedKeys(const KVSnapshot& cache)
    : words_(static_cast<std::size_t>(cache.lengths().shape[0] * (1 + cache.paged().stride)) * 8),
      floats_(cache.paged().dtype != DType::s8
                  ? 0
                  : static_cast<std::size_t>(2 * cache.lengths().shape[0] * cache.paged().heads *
                                             cache.longest() * cache.paged().dims) *
                        4) {
  const PagedKeys layout = cache.paged();
  const View of_host = cache.lengths();
  const std::int64_t batch = of_host.shape[0], longest = cache.longest();
  const std::int64_t count = batch * layout.stride;
  const bool widened = layout.dtype == DType::s8;
  const std::int64_t size = widened ? 1 : dtype_size(layout.dtype);

  // What a sequence does not have is some other page: lengths on the device may be wrong, and then
  // rows are, but nothing outside is read.
  const char* some = nullptr;
  for (std::int64_t i = 0; i < count; ++i) some = layout.pages[i] ? layout.pages[i] : some;
  std::vector<std::int64_t> words(of_host.ptr<std::int64_t>(), of_host.ptr<std::int64_t>() + batch);
  for (std::int64_t i = 0; i < count; ++i) {
    const char* const page = layout.pages[i] ? layout.pages[i] : some;
    words.push_back((page - some) / size);
  }
  std::int64_t* const table = words_.as<std::int64_t>();
  for (std::size_t begin = 0; begin < words.size(); begin += kWords) {
    const std::size_t part = std::min<std::size_t>(words.size() - begin, kWords);
    Words some_words{};
    std::copy_n(words.begin() + static_cast<std::ptrdiff_t>(begin), part, some_words.word);
    gpu::launch("kvcache_table", table_kernel, dim3(1), dim3(kWords), 0, gpu::current_stream(),
                some_words, static_cast<int>(part), table + begin);
  }
  lengths = {table, true, 1, batch};

  if (widened) {
    const std::int64_t rows = batch * layout.heads * longest;
    if (rows > 0) {
      gpu::launch("kvcache_widen", widen_kernel, dim3(blocks_for(2 * rows, kWarps)),
                  dim3(32 * kWarps), 0, gpu::current_stream(), some, table + batch, layout.stride,
                  layout, longest, rows, floats_.as<float>());
    }
    const auto half = [&](std::int64_t first) {
      return attention::operand_of(keys_view(floats_.as<float>() + first, DType::f32,
                                             {batch, layout.heads, longest, layout.dims}));
    };
    k = half(0), v = half(rows * layout.dims);
    return;
  }
  for (const bool value : {false, true}) {
    char* const first = some ? const_cast<char*>(some) + (value ? layout.value : 0) : nullptr;
    attention::Operand& o = value ? v : k;
    o = attention::operand_of(
        keys_view(first, layout.dtype, {batch, layout.heads, layout.tokens, layout.dims}));
    o.shape[2] = longest;
    o.pages = {table + batch, layout.stride, static_cast<int>(layout.tokens)};
  }
}

}  // namespace tilewright::cuda
