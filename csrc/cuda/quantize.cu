// quantize, dequantize, and the rows of a product's left-hand side.
//
//     symmetric    s = max |x| / L             q = clamp(rne(x / s), -L, L)
//     with offset  s = (max x - min x) / L     q = clamp(rne((x - min x) / s), 0, L)
//     back         y = s q,  or fma(s, q, offset)
//
// Elements that share a scale are a line: all, those of one index of `axis`, a group of neighbours
// along `along` for each of these. Three launches: blocks fold parts of lines, a thread for each
// line folds those and finds its scale, then a thread for each byte rounds its element, or with 4
// bits its two neighbours along `along`, the first one in the lower nibble.
//
// Parameter      bounded by
// kThreads       a part's reduction: 8 warps meet once
// parts          one line alone has to keep every processor at work: up to 128 parts of it
//
// Bound by memory: x is read twice, a byte an element is written. Columns of a matrix by rows, as
// lines, use a part of each sector in the first pass.
// Numerics: ops.h; IEEE division, rounding to nearest even: the bits are the CPU's. Maxima do not
// depend on the order in which they are taken. NaN stays NaN.
#include <algorithm>

#include "cuda/array.h"
#include "cuda/elements.h"
#include "cuda/int8.h"
#include "cuda/kernels.h"
#include "cuda/levels.h"
#include "cuda/team.h"

namespace tilewright::cuda {
namespace {

constexpr int kThreads = 256;
constexpr std::int64_t kMostParts = 128, kInPart = 16 * kThreads;

// Two arrays of one shape, and the lines they are made of.
struct Lines {
  int rank = 0;
  std::int64_t shape[kMaxRank], x[kMaxRank], q[kMaxRank];  // and strides
  DType x_dtype = DType::f32;
  const void* x_data = nullptr;
  std::uint8_t* q_data = nullptr;
  bool q_signed = true;
  int axis = -1, along = -1, pairs = -1;  // the axis of scales, of groups, and of pairs of 4 bits
  std::int64_t group = 1, groups = 1;
  std::int64_t lines = 1, in_line = 1;  // elements of a whole line

  __device__ int in_byte() const { return pairs < 0 ? 1 : 2; }
  // Where element `which` of byte i, in row-major order, lies in both, and the line it belongs to;
  // not inside where an odd number of elements leaves half a byte.
  struct Element {
    std::int64_t x, q, channel, group;
    bool inside;
  };
  __device__ Element element(std::int64_t i, int which) const {
    Element e{0, 0, 0, 0, true};
    for (int d = rank - 1; d >= 0; --d) {
      const std::int64_t extent = d == pairs ? (shape[d] + 1) / 2 : shape[d];
      std::int64_t at = i % extent;
      i /= extent;
      e.q += at * q[d];
      if (d == pairs) {
        at = 2 * at + which;
        e.inside = at < shape[d];
      }
      e.x += at * x[d];
      if (d == axis) e.channel = at;
      if (d == along) e.group = at / group;
    }
    return e;
  }
  // Where element i of a line lies in x; false where the line is a shorter last group without it.
  __device__ bool in(std::int64_t line, std::int64_t i, std::int64_t& at) const {
    bool inside = true;
    at = axis >= 0 ? line / groups * x[axis] : 0;
    for (int d = rank - 1; d >= 0; --d) {
      if (d == axis) continue;
      const std::int64_t extent = d == along ? group : shape[d];
      std::int64_t index = i % extent;
      i /= extent;
      if (d == along) {
        index += line % groups * group;
        inside = index < shape[d];
      }
      at += index * x[d];
    }
    return inside;
  }
};

// A number for each line.
struct Numbers {
  float* data = nullptr;
  std::int64_t channel_stride = 0, group_stride = 0;

  __device__ float& at(std::int64_t channel, std::int64_t group) const {
    return data[channel * channel_stride + group * group_stride];
  }
};

Lines lines_of(const View& x, const View& q, int axis, int along, std::int64_t group, int bits) {
  Lines l;
  if (bits == 4) l.pairs = along;
  l.rank = x.rank;
  l.x_dtype = x.dtype, l.x_data = x.data;
  l.q_data = q.ptr<std::uint8_t>(), l.q_signed = q.dtype == DType::s8;
  l.axis = axis < 0 ? -1 : axis;
  if (group > 0) {
    l.along = along, l.group = group;
    l.groups = (x.shape[along] + group - 1) / group;
  }
  for (int d = 0; d < x.rank; ++d) {
    l.shape[d] = x.shape[d], l.x[d] = x.stride[d], l.q[d] = q.stride[d];
    if (d == l.axis) {
      l.lines *= x.shape[d];
    } else {
      l.in_line *= d == l.along ? group : x.shape[d];
    }
  }
  l.lines *= l.groups;
  return l;
}

Numbers numbers_of(const View& v, const Lines& l) {
  if (!v) return {};
  const auto stride = [&](int d) { return d < 0 ? 0 : v.stride[d]; };
  if (l.along >= 0) return {v.ptr<float>(), stride(l.axis), stride(l.along)};
  return {v.ptr<float>(), v.rank ? v.stride[0] : 0, 0};
}

// What is known of a line, or of a part of it.
struct Range {
  float low, high;  // symmetric: low is not used, high is the largest magnitude

  __device__ void join(const Range& other) {
    low = smaller(low, other.low), high = larger(high, other.high);
  }
  __device__ void add(float value, bool symmetric) {
    join(symmetric ? Range{low, fabsf(value)} : Range{value, value});
  }
};

struct Shared {
  Range of_warp[kThreads / 32];
};

// The range of what all threads of a block have seen, in thread 0.
__device__ inline Range meet(Range mine) {
  Shared& shared = gpu::shared_memory<Shared>();
  for (int d = 16; d; d /= 2) {
    mine.join({__shfl_xor_sync(kAllLanes, mine.low, d), __shfl_xor_sync(kAllLanes, mine.high, d)});
  }
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (threadIdx.x % 32 == 0) shared.of_warp[warp] = mine;
  __syncthreads();
  for (int w = 0; w < kThreads / 32; ++w) mine.join(shared.of_warp[w]);
  return mine;
}

__global__ void fold_kernel(const __grid_constant__ Lines l, std::int64_t parts, Range start,
                            bool symmetric, Range* found) {
  const std::int64_t block = blockIdx.x, line = block / parts, part = block % parts;
  Range mine = start;
  for (std::int64_t i = part * kThreads + threadIdx.x; i < l.in_line; i += parts * kThreads) {
    std::int64_t at;
    if (l.in(line, i, at)) mine.add(get_float(l.x_data, at, l.x_dtype), symmetric);
  }
  mine = meet(mine);
  if (threadIdx.x == 0) found[block] = mine;
}

__global__ void scale_kernel(const Range* found, std::int64_t lines, std::int64_t groups,
                             std::int64_t parts, float levels, Numbers scale, Numbers offset) {
  const std::int64_t line = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (line >= lines) return;
  Range all = found[line * parts];
  for (std::int64_t p = 1; p < parts; ++p) all.join(found[line * parts + p]);
  const std::int64_t channel = line / groups, group = line % groups;
  const float range = offset.data ? all.high - all.low : all.high;
  scale.at(channel, group) = scale_of(range, levels);
  if (offset.data) offset.at(channel, group) = all.low;
}

__global__ void quantize_kernel(const __grid_constant__ Lines l, std::int64_t bytes, float low,
                                float high, Numbers scale, Numbers offset) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= bytes) return;
  int byte = 0;
  std::int64_t to = 0;
  for (int which = 0; which < l.in_byte(); ++which) {
    const Lines::Element e = l.element(i, which);
    if (!e.inside) break;
    float x = get_float(l.x_data, e.x, l.x_dtype);
    if (offset.data) x = x - offset.at(e.channel, e.group);
    const int q = round_to_level(x, scale.at(e.channel, e.group), low, high);
    byte |= l.in_byte() == 1 ? q : (q & 15) << 4 * which;
    to = e.q;
  }
  l.q_data[to] = static_cast<std::uint8_t>(byte);
}

__global__ void dequantize_kernel(const __grid_constant__ Lines l, std::int64_t bytes,
                                  Numbers scale, Numbers offset) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= bytes) return;
  for (int which = 0; which < l.in_byte(); ++which) {
    const Lines::Element e = l.element(i, which);
    if (!e.inside) break;
    const std::uint8_t byte = l.q_data[e.q];
    int q = l.q_signed ? static_cast<std::int8_t>(byte) : byte;
    if (l.in_byte() == 2) {
      q = which == 1 ? q >> 4 : l.q_signed ? static_cast<std::int8_t>(byte << 4) >> 4 : byte & 15;
    }
    const float s = scale.at(e.channel, e.group), value = static_cast<float>(q);
    const float y = offset.data ? fmaf(s, value, offset.at(e.channel, e.group)) : s * value;
    put_float(const_cast<void*>(l.x_data), e.x, l.x_dtype, y);
  }
}

// A block for each row of x (rows, K).
__global__ void quantize_rows_kernel(const __grid_constant__ Rows x, std::int64_t K,
                                     std::int8_t* data, float* scale) {
  const std::int64_t row = blockIdx.x, from = x.row(row);
  Range mine{0.0f, 0.0f};
  for (std::int64_t k = threadIdx.x; k < K; k += kThreads) {
    mine.add(x.load<Mixed>(from + k * x.step), true);
  }
  const float s = scale_of(meet(mine).high, 127.0f);
  for (std::int64_t k = threadIdx.x; k < K; k += kThreads) {
    const int q = round_to_level(x.load<Mixed>(from + k * x.step), s, -127.0f, 127.0f);
    data[row * K + k] = static_cast<std::int8_t>(q);
  }
  if (threadIdx.x == 0) scale[row] = s;
}

}  // namespace

void quantize(const Quantize& op) {
  const Lines l = lines_of(op.x, op.data, op.axis, op.along, op.group, op.bits);
  if (l.lines == 0) return;
  const bool symmetric = !op.offset;
  const float top = static_cast<float>((1 << (op.bits - (symmetric ? 1 : 0))) - 1);
  const std::int64_t bytes = op.data.size();
  const std::int64_t parts =
      std::clamp<std::int64_t>(std::min(l.in_line / kInPart, kMostParts / l.lines), 1, kMostParts);
  const float start = symmetric || bytes == 0 ? 0.0f : INFINITY;
  const gpu::Workspace found(static_cast<std::size_t>(l.lines * parts) * sizeof(Range));
  const Numbers scale = numbers_of(op.scale, l), offset = numbers_of(op.offset, l);
  gpu::launch("quantize_fold", fold_kernel, dim3(static_cast<unsigned>(l.lines * parts)),
              dim3(kThreads), sizeof(Shared), gpu::current_stream(), l, parts, Range{start, -start},
              symmetric, found.as<Range>());
  gpu::launch("quantize_scale", scale_kernel, dim3(blocks_for(l.lines, kThreads)), dim3(kThreads),
              0, gpu::current_stream(), found.as<Range>(), l.lines, l.groups, parts, top, scale,
              offset);
  if (bytes == 0) return;
  gpu::launch("quantize", quantize_kernel, dim3(blocks_for(bytes, kThreads)), dim3(kThreads), 0,
              gpu::current_stream(), l, bytes, symmetric ? -top : 0.0f, top, scale, offset);
}

void dequantize(const Dequantize& op) {
  const Lines l = lines_of(op.out, op.data, op.axis, op.along, op.group, op.bits);
  const std::int64_t bytes = op.data.size();
  if (bytes == 0) return;
  gpu::launch("dequantize", dequantize_kernel, dim3(blocks_for(bytes, kThreads)), dim3(kThreads), 0,
              gpu::current_stream(), l, bytes, numbers_of(op.scale, l), numbers_of(op.offset, l));
}

void quantize_rows(const View& x, std::int8_t* data, float* scale) {
  std::int64_t rows = 1;
  for (int d = 0; d < x.rank - 1; ++d) rows *= x.shape[d];
  if (rows == 0) return;
  gpu::launch("quantize_rows", quantize_rows_kernel, dim3(static_cast<unsigned>(rows)),
              dim3(kThreads), sizeof(Shared), gpu::current_stream(), rows_of(x), x.last(), data,
              scale);
}

}  // namespace tilewright::cuda
