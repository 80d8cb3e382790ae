// Operands of a matrix product, tile by tile into shared memory, and the loop over K around them.
//
//     out (M, N) = a b      a's lines are its rows, b's lines are its columns; both run along K
//
// A tile lies in shared memory the way its operand lies in global memory, so that 16 bytes travel
// as they are:
//
//     Major::k     run = a line, its neighbours along K side by side      a by rows, b transposed
//     Major::line  run = one k, its neighbouring lines side by side       a transposed, b by rows
//
// A run is cut into slots of 16 bytes. Slots change places within their 128 bytes, in a pattern that
// suits how the kernel reads (Swizzle), so that no read meets a bank twice.
//
// Aligned operands come by cp.async; whatever else a view may be (odd strides, an offset start, a
// wider or narrower float) comes element by element into the same tile. What lies outside is zero.
#pragma once
#include "cuda/elements.h"

namespace tilewright::cuda {

enum class Major : std::uint8_t { k, line };

// Which reads a tile is arranged for.
enum class Swizzle : std::uint8_t {
  rows,   // 8 neighbouring runs, one slot each: ldmatrix
  quads,  // every fourth run, one slot each: a thread holds 4 neighbouring lines
  words,  // 4 neighbouring runs, 8 neighbouring words each: fragments of 32-bit elements
  none,   // neighbouring slots of one run
};

// Element (line, k) lies at data + line * line_stride + k * k_stride, in elements.
struct Operand {
  const void* data;
  DType dtype;
  bool async;  // aligned, and of the tile's own type: 16 bytes travel at once
  std::int64_t line_stride, k_stride;

  __device__ std::int64_t offset(std::int64_t line, std::int64_t k) const {
    return line * line_stride + k * k_stride;
  }
  template <class T>
  __device__ T at(std::int64_t line, std::int64_t k) const {
    if constexpr (sizeof(T) == 4) {
      return get_float(data, offset(line, k), dtype);
    } else {
      return static_cast<const T*>(data)[offset(line, k)];
    }
  }
};

// `lines` x `depth` elements of T. T of 16 or 8 bits stands for any type of that size.
template <class T, Major major, int lines, int depth, Swizzle swizzle>
struct alignas(128) Tile {
  static constexpr int kInSlot = 16 / sizeof(T);
  static constexpr int kRuns = major == Major::k ? lines : depth;
  static constexpr int kSlots = (major == Major::k ? depth : lines) / kInSlot;  // of a run
  static_assert(kSlots >= 2 && kRuns * kSlots % 8 == 0);

  uint4 slots[kRuns * kSlots];

  __device__ uint4* slot(int run, int index) {
    int pattern = 0;
    if constexpr (swizzle == Swizzle::rows) {
      pattern = kSlots >= 8 ? run & 7 : run / (8 / kSlots) & (kSlots - 1);
    } else if constexpr (swizzle == Swizzle::quads) {
      pattern = run / 4 & 7;
    } else if constexpr (swizzle == Swizzle::words) {
      pattern = (run & 3) * 2;
    }
    return slots + ((run * kSlots + index) ^ pattern);
  }
  // Element `at` of a run, of 32 bits.
  __device__ std::uint32_t word(int run, int at) {
    return reinterpret_cast<const std::uint32_t*>(slot(run, at / 4))[at % 4];
  }

  // Lines [line0, ..) below line_end, elements [k0, ..) below k_end of x, by all threads of a block.
  // x: an Operand, or what else has at(line, k) and is never async.
  template <int threads, class Source>
  __device__ void copy(const Source& x, std::int64_t line0, std::int64_t line_end, std::int64_t k0,
                       std::int64_t k_end) {
    if constexpr (std::is_same_v<Source, Operand>) {
      if (x.async) {
#pragma unroll
        for (int i = 0; i < kRounds<threads>; ++i) {
          const Piece piece = piece_of<threads>(i, false, line0, line_end, k0, k_end);
          if (!piece.to) break;
          const std::int64_t offset = piece.valid ? x.offset(piece.line, piece.k) : 0;
          gpu::cp_async16(piece.to, static_cast<const T*>(x.data) + offset,
                          piece.valid * static_cast<int>(sizeof(T)));
        }
        return;
      }
    }
    // Lanes side by side take what lies side by side.
    const bool across = major == Major::k && x.line_stride == 1;
#pragma unroll 1
    for (int i = 0; i < kRounds<threads>; ++i) {
      const Piece piece = piece_of<threads>(i, across, line0, line_end, k0, k_end);
      if (!piece.to) break;
      gather(x, piece);
    }
  }

 private:
  template <int threads>
  static constexpr int kRounds = (kRuns * kSlots + threads - 1) / threads;

  // What one thread copies at once: the first `valid` elements of a slot, the others are zero.
  struct Piece {
    uint4* to;  // nullptr: nothing is left for this thread
    std::int64_t line, k;
    int valid;
  };
  template <int threads>
  __device__ Piece piece_of(int round, bool across, std::int64_t line0, std::int64_t line_end,
                            std::int64_t k0, std::int64_t k_end) {
    const int index = round * threads + static_cast<int>(threadIdx.x);
    if (kRuns * kSlots % threads != 0 && index >= kRuns * kSlots) return {nullptr, 0, 0, 0};
    const int run = across ? index % kRuns : index / kSlots;
    const int at = (across ? index / kRuns : index % kSlots) * kInSlot;
    const std::int64_t line = line0 + (major == Major::k ? run : at);
    const std::int64_t k = k0 + (major == Major::k ? at : run);
    const std::int64_t left =
        major == Major::k ? (line < line_end ? k_end - k : 0) : (k < k_end ? line_end - line : 0);
    const auto valid = max(std::int64_t{0}, min(left, std::int64_t{kInSlot}));
    return {slot(run, at / kInSlot), line, k, static_cast<int>(valid)};
  }
  template <class Source>
  __device__ static void gather(const Source& x, const Piece& piece) {
    struct alignas(16) Elements {
      T x[kInSlot];
    } found{};
#pragma unroll
    for (int e = 0; e < kInSlot; ++e) {
      if (e >= piece.valid) continue;
      found.x[e] = major == Major::k ? x.template at<T>(piece.line, piece.k + e)
                                     : x.template at<T>(piece.line + e, piece.k);
    }
    gpu::store(piece.to, found);
  }
};

// The loop over K: load(stage, step) starts copies into one of `stages` buffers, multiply(stage,
// step) reads them; stages - 1 steps are on their way while one is multiplied. One barrier a step:
// it says that everybody's copies have landed, and that the buffer which is refilled next has been
// read. Ends with a barrier: shared memory is free again.
template <int stages, class Load, class Multiply>
__device__ inline void for_steps(std::int64_t steps, const Load& load, const Multiply& multiply) {
  static_assert(stages >= 2);
#pragma unroll
  for (int s = 0; s < stages - 1; ++s) {
    if (s < steps) load(s, std::int64_t{s});
    gpu::cp_async_commit();
  }
  int stage = 0;
  for (std::int64_t step = 0; step < steps; ++step) {
    gpu::cp_async_wait<stages - 2>();
    __syncthreads();
    const std::int64_t next = step + stages - 1;
    if (next < steps) load(stage == 0 ? stages - 1 : stage - 1, next);
    gpu::cp_async_commit();
    multiply(stage, step);
    stage = stage + 1 == stages ? 0 : stage + 1;
  }
  gpu::cp_async_wait<0>();
  __syncthreads();
}

}  // namespace tilewright::cuda
