// Attention's tiles in shared memory and their two products, for float32 by FFMA and for the 16-bit
// floats by tensor cores. Both give a thread the same accumulators, those of mma m16n8, so that the
// kernels above know no difference:
//
//              n = 0      n = 1
//            +----------+----------+      lane 4 g + t of a warp has, of each (16, 8) fragment n,
//   line g   | 2t, 2t+1 |          |        c[0], c[1]  line g,      columns 8 n + 2 t and + 1
//   line g+8 | 2t, 2t+1 |          |        c[2], c[3]  line g + 8,  the same columns
//            +----------+----------+
//
//   multiply_transposed   S (16, N) += A (16, D) B (N, D)^T      both from shared memory
//   multiply              O (16, D) += P (16, N) B (N, D)        P from accumulators
//
// Numerics: float32 is one chain of fmaf along D, or along N, in ascending order. 16 bits: exact
// products, float32 sums of 16 at a time; P is two 16-bit terms where kTerms is 2, wrong by 2^-17 of
// itself (float16: or by 2^-25), and one rounded term where it is 1. Guarded products leave out the
// terms of zero weight, which would make NaN of Inf and NaN; all others have the same bits.
//
// Swizzle: the 16-byte chunk c of line r lies at c ^ (r % 8): eight lines of one chunk, which ldmatrix
// and the FFMA loop read at once, are in different banks.
#pragma once
#include "cuda/attention.h"

namespace tilewright::cuda::attention {

template <class T>
struct Type;
template <>
struct Type<float> {
  static constexpr DType dtype = DType::f32;
};
template <>
struct Type<__nv_bfloat16> {
  static constexpr DType dtype = DType::bf16;
  static constexpr std::uint32_t kInfinity = 0x7f80, kOne = 0x3f80;
  __device__ static std::uint32_t pack(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    std::uint32_t bits;
    memcpy(&bits, &pair, sizeof bits);
    return bits;
  }
  __device__ static float rest(float x) { return x - __bfloat162float(__float2bfloat16_rn(x)); }
};
template <>
struct Type<__half> {
  static constexpr DType dtype = DType::f16;
  static constexpr std::uint32_t kInfinity = 0x7c00, kOne = 0x3c00;
  __device__ static std::uint32_t pack(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    std::uint32_t bits;
    memcpy(&bits, &pair, sizeof bits);
    return bits;
  }
  __device__ static float rest(float x) { return x - __half2float(__float2half_rn(x)); }
};

template <class T>
__device__ void mma(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  if constexpr (Type<T>::dtype == DType::bf16) {
    gpu::mma_bf16(d, a, b);
  } else {
    gpu::mma_f16(d, a, b);
  }
}

__device__ inline float dot(const float4& a, const float4& b, float sum) {
  return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}

template <class T>
__device__ uint4 packed(const float4& a, const float4& b) {
  return make_uint4(Type<T>::pack(a.x, a.y), Type<T>::pack(a.z, a.w), Type<T>::pack(b.x, b.y),
                    Type<T>::pack(b.z, b.w));
}

// --- tiles

template <class T, int kRows, int kDims>
struct Tile {
  static constexpr int kPerChunk = 16 / sizeof(T), kChunks = kDims / kPerChunk;
  T element[kRows * kDims];

  // Where chunk c lies in `row`. Only the last three bits of c change: what is added to them stays a
  // constant of the address.
  __device__ static int place(int row, int c, int pattern) {
    return row * kDims + ((c & ~7) + ((c ^ pattern) & 7)) * kPerChunk;
  }
  __device__ T* chunk(int row, int c) { return &element[place(row, c, row)]; }
  __device__ const T* chunk(int row, int c) const { return &element[place(row, c, row)]; }
  __device__ T* at(int row, int d) { return chunk(row, d / kPerChunk) + d % kPerChunk; }
};

// Lines of x, zero where `place(line)` is kNowhere, and beyond `dims`. The usual rows come by cp.async,
// to be committed by the caller; others element by element, of whatever dtype.
template <int kThreads, class T, int kRows, int kDims, class PlaceOf>
__device__ void load_tile(Tile<T, kRows, kDims>& to, const Operand& x, int dims,
                          const PlaceOf& place) {
  using Shape = Tile<T, kRows, kDims>;
  const int thread = static_cast<int>(threadIdx.x);
  if (x.vectors && x.dtype == Type<T>::dtype) {
    const T* const data = static_cast<const T*>(x.data);
#pragma unroll 1  // else every piece's address waits in registers for the next tile
    for (int i = thread; i < kRows * Shape::kChunks; i += kThreads) {
      const int row = i / Shape::kChunks, c = i % Shape::kChunks;
      const std::int64_t at = place(row);
      const bool valid = at != kNowhere && c * Shape::kPerChunk < dims;
      gpu::cp_async16(to.chunk(row, c), valid ? data + at + c * Shape::kPerChunk : data,
                      valid ? 16 : 0);
    }
  } else {
#pragma unroll 1
    for (int i = thread; i < kRows * kDims; i += kThreads) {
      const int row = i / kDims, d = i % kDims;
      const std::int64_t at = place(row);
      const float value = at != kNowhere && d < dims ? x.element(at + d * x.stride[3]) : 0.0f;
      round_to(*to.at(row, d), value);
    }
  }
}

// --- S += A B^T, over `dims` elements of each line

// A warp's lines of A as fragments in registers, read once for many products.
template <class T, int kDims>
struct Fragments {
  std::uint32_t a[kDims / 16][4];

  template <int kRows>
  __device__ explicit Fragments(const Tile<T, kRows, kDims>& A) {
#pragma unroll
    for (int k = 0; k < kDims / 16; ++k) {
      gpu::ldmatrix(a[k], A.chunk(warp_line() + lane_id() % 16, 2 * k + lane_id() / 16));
    }
  }
};

// The part of 16 elements from chunk c on.
template <class T, int kRowsB, int kDims, int N>
__device__ void multiply_step(const std::uint32_t (&a)[4], const Tile<T, kRowsB, kDims>& B, int c,
                              float (&s)[N][4]) {
  const int lane = lane_id();
#pragma unroll
  for (int n = 0; n < N; n += 2) {
    std::uint32_t b[4];
    gpu::ldmatrix(b, B.chunk(n * 8 + lane % 8 + lane / 16 * 8, c + lane / 8 % 2));
    mma<T>(s[n], a, {b[0], b[1]});
    mma<T>(s[n + 1], a, {b[2], b[3]});
  }
}

template <class T, int kDims, int kRowsB, int N>
__device__ void multiply_transposed(const Fragments<T, kDims>& A, const Tile<T, kRowsB, kDims>& B,
                                    int dims, float (&s)[N][4]) {
#pragma unroll
  for (int k = 0; k < kDims / 16; ++k) {
    if (16 * k >= dims) break;
    multiply_step(A.a[k], B, 2 * k, s);
  }
}

template <class T, int kRowsA, int kDims, int kRowsB, int N>
__device__ void multiply_transposed(const Tile<T, kRowsA, kDims>& A,
                                    const Tile<T, kRowsB, kDims>& B, int dims, float (&s)[N][4]) {
  const int lane = lane_id(), line = warp_line();
  if constexpr (sizeof(T) == 2) {
    for (int k = 0; k < dims; k += 16) {
      std::uint32_t a[4];
      gpu::ldmatrix(a, A.chunk(line + lane % 16, k / 8 + lane / 16));
      multiply_step(a, B, k / 8, s);
    }
  } else {
    for (int k = 0; k < dims; k += 4) {
      const float4 low = gpu::load<float4>(A.chunk(line + lane / 4, k / 4));
      const float4 high = gpu::load<float4>(A.chunk(line + lane / 4 + 8, k / 4));
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float4 b = gpu::load<float4>(B.chunk(n * 8 + lane % 4 * 2 + e, k / 4));
          s[n][e] = dot(low, b, s[n][e]);
          s[n][e + 2] = dot(high, b, s[n][e + 2]);
        }
      }
    }
  }
}

// --- O += P B

// Weights of a step as the left operand of a product: 16 bits keep them in registers, as fragments;
// float32 in the warp's part of shared memory, where every lane can read them.
template <class T, int N, int kTerms>
struct Weights {
  struct Memory {};
  std::uint32_t term[kTerms][N / 2][4];

  __device__ Weights(Memory*, const float (&p)[N][4]) {
#pragma unroll
    for (int k = 0; k < N / 2; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float x = p[2 * k + i / 2][i % 2 * 2], y = p[2 * k + i / 2][i % 2 * 2 + 1];
        term[0][k][i] = Type<T>::pack(x, y);
        if constexpr (kTerms == 2)
          term[1][k][i] = Type<T>::pack(Type<T>::rest(x), Type<T>::rest(y));
      }
    }
  }

  template <int kRows, int kDims>
  __device__ void multiply(const Tile<T, kRows, kDims>& B, float (&o)[kDims / 8][4]) const {
    const int lane = lane_id();
#pragma unroll
    for (int k = 0; k < N / 2; ++k) {
#pragma unroll
      for (int n = 0; n < kDims / 8; n += 2) {
        std::uint32_t b[4];
        gpu::ldmatrix_transposed(b, B.chunk(k * 16 + lane % 16, n + lane / 16));
#pragma unroll
        for (int i = 0; i < kTerms; ++i) {
          mma<T>(o[n], term[i][k], {b[0], b[1]});
          mma<T>(o[n + 1], term[i][k], {b[2], b[3]});
        }
      }
    }
  }

  // Inf and NaN in B become zeros; what they add is found by two products with ones in their places,
  // and where a weight is not zero.
  template <int kRows, int kDims>
  __device__ void multiply_guarded(const float (&p)[N][4], const Tile<T, kRows, kDims>& B,
                                   float (&o)[kDims / 8][4]) const {
    const int lane = lane_id();
#pragma unroll
    for (int n = 0; n < kDims / 8; ++n) {
      float up[4] = {}, down[4] = {};
#pragma unroll
      for (int k = 0; k < N / 2; ++k) {
        std::uint32_t b[2], ups[2], downs[2], ones[4];
        gpu::ldmatrix_transposed(b, B.chunk(k * 16 + lane % 16, n));
#pragma unroll
        for (int i = 0; i < 2; ++i) sort(b[i], ups[i], downs[i]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float x = p[2 * k + i / 2][i % 2 * 2], y = p[2 * k + i / 2][i % 2 * 2 + 1];
          ones[i] = (x != 0 ? Type<T>::kOne : 0u) | (y != 0 ? Type<T>::kOne << 16 : 0u);
        }
#pragma unroll
        for (int i = 0; i < kTerms; ++i) mma<T>(o[n], term[i][k], b);
        mma<T>(up, ones, ups);
        mma<T>(down, ones, downs);
      }
      bool found = false;
#pragma unroll
      for (int e = 0; e < 4; ++e) found = found || up[e] > 0 || down[e] > 0;
      // Decided at once: else `up` and `down` of all n would wait in registers.
      if (!__any_sync(kAllLanes, found)) continue;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        o[n][e] = o[n][e] + (up[e] > 0 ? INFINITY : 0.0f) - (down[e] > 0 ? INFINITY : 0.0f);
      }
    }
  }

 private:
  // Ones where an element of the pair is Inf or -Inf, which becomes zero. A NaN goes both ways, so
  // that it ends as one.
  __device__ static void sort(std::uint32_t& pair, std::uint32_t& up, std::uint32_t& down) {
    std::uint32_t kept = 0;
    up = down = 0;
#pragma unroll
    for (int shift = 0; shift < 32; shift += 16) {
      const std::uint32_t bits = pair >> shift & 0xffffu, size = bits & 0x7fffu;
      const bool finite = size<Type<T>::kInfinity, nan = size> Type<T>::kInfinity;
      up |= (!finite && (nan || bits == size) ? Type<T>::kOne : 0u) << shift;
      down |= (!finite && (nan || bits != size) ? Type<T>::kOne : 0u) << shift;
      kept |= (finite ? bits : 0u) << shift;
    }
    pair = kept;
  }
};

template <int N, int kTerms>
struct Weights<float, N, kTerms> {
  static constexpr int kPitch = (8 * N + 23) / 32 * 32 + 8;  // rows 8 banks apart: 4 do not meet
  struct Memory {
    alignas(16) float p[16 * kPitch];
  };
  const float* p;

  __device__ Weights(Memory* of_warps, const float (&from)[N][4]) {
    const int lane = lane_id();
    float* const to = of_warps[threadIdx.x / 32].p;
    __syncwarp();  // who still reads the last ones
#pragma unroll
    for (int n = 0; n < N; ++n) {
      float* const line = to + lane / 4 * kPitch + n * 8 + lane % 4 * 2;
      gpu::store(line, make_float2(from[n][0], from[n][1]));
      gpu::store(line + 8 * kPitch, make_float2(from[n][2], from[n][3]));
    }
    __syncwarp();
    p = to;
  }

  template <int kRows, int kDims>
  __device__ void multiply(const Tile<float, kRows, kDims>& B, float (&o)[kDims / 8][4]) const {
    run<false>(B, o);
  }
  template <int kRows, int kDims>
  __device__ void multiply_guarded(const float (&)[N][4], const Tile<float, kRows, kDims>& B,
                                   float (&o)[kDims / 8][4]) const {
    run<true>(B, o);
  }

 private:
  template <bool kGuarded, int kRows, int kDims>
  __device__ void run(const Tile<float, kRows, kDims>& B, float (&o)[kDims / 8][4]) const {
    const int lane = lane_id();
    for (int two = 0; two < 8 * N; two += 2) {  // of 8 bytes 4 rows come at once, in other banks
      const float2 low = gpu::load<float2>(p + lane / 4 * kPitch + two);
      const float2 high = gpu::load<float2>(p + (lane / 4 + 8) * kPitch + two);
#pragma unroll
      for (int k = 0; k < 2; ++k) {
#pragma unroll
        for (int n = 0; n < kDims / 8; ++n) {
          const float2 b = gpu::load<float2>(B.chunk(two + k, n * 2 + lane % 4 / 2) + lane % 2 * 2);
          add<kGuarded>(o[n][0], k ? low.y : low.x, b.x);
          add<kGuarded>(o[n][1], k ? low.y : low.x, b.y);
          add<kGuarded>(o[n][2], k ? high.y : high.x, b.x);
          add<kGuarded>(o[n][3], k ? high.y : high.x, b.y);
        }
      }
    }
  }
  template <bool kGuarded>
  __device__ static void add(float& sum, float weight, float x) {
    if (!kGuarded || weight != 0.0f) sum = fmaf(weight, x, sum);
  }
};

// Of a thread's sums. A product that is not guarded makes NaN of what its zero weights should hide.
template <int N>
__device__ bool all_finite(const float (&o)[N][4]) {
  bool all = true;
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) all = all && fabsf(o[n][e]) < INFINITY;
  }
  return all;
}

// --- what a block has at its end, to memory

// Sums (16, kDims) of each warp, times the factor of each line, as rows of x: through shared memory,
// so that a warp writes whole sectors. The memory is the warp's own part of `stage`.
template <int M, int kDims, class PlaceOf>
__device__ void store_tile(Tile<float, M, kDims>& stage, const float (&o)[kDims / 8][4],
                           const float (&factor)[2], const Operand& x, int dims,
                           const PlaceOf& place) {
  const int lane = lane_id(), line = warp_line();
  // Another swizzle: stored are 8 bytes of each of 4 lanes of 4 rows at once.
  const auto chunk = [&](int r, int c) {
    return &stage.element[Tile<float, M, kDims>::place(r, c, 2 * r)];
  };
#pragma unroll
  for (int n = 0; n < kDims / 8; ++n) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {  // + 0: the zeros of both signs are one number, and get its bits
      gpu::store(chunk(line + lane / 4 + 8 * h, 2 * n + lane % 4 / 2) + lane % 2 * 2,
                 make_float2(o[n][2 * h] * factor[h] + 0.0f, o[n][2 * h + 1] * factor[h] + 0.0f));
    }
  }
  __syncwarp();
  if (x.vectors && x.dtype == DType::f32) {
    for (int i = lane; i < 16 * kDims / 4; i += 32) {
      const int r = line + i / (kDims / 4), c = i % (kDims / 4);
      const std::int64_t at = place(r);
      if (at == kNowhere || c * 4 >= dims) continue;
      gpu::store(static_cast<float*>(x.data) + at + c * 4, gpu::load<float4>(chunk(r, c)));
    }
  } else if (x.vectors) {
    for (int i = lane; i < 16 * kDims / 8; i += 32) {
      const int r = line + i / (kDims / 8), c = i % (kDims / 8);
      const std::int64_t at = place(r);
      if (at == kNowhere || c * 8 >= dims) continue;
      const int odd = c / 4 % 2;  // every other four lanes begin with the second half: other banks
      float4 a = gpu::load<float4>(chunk(r, 2 * c + odd));
      float4 b = gpu::load<float4>(chunk(r, 2 * c + 1 - odd));
      if (odd) {
        const float4 first = b;
        b = a, a = first;
      }
      gpu::store(static_cast<std::uint16_t*>(x.data) + at + c * 8,
                 x.dtype == DType::bf16 ? packed<__nv_bfloat16>(a, b) : packed<__half>(a, b));
    }
  } else {
    for (int i = lane; i < 16 * kDims; i += 32) {
      const int r = line + i / kDims, d = i % kDims;
      const std::int64_t at = place(r);
      if (at != kNowhere && d < dims) x.store<Mixed>(at + d * x.stride[3], chunk(r, d / 4)[d % 4]);
    }
  }
}

// f(T(), dims): the elements that kernels work on, and the head dimensions they are padded to.
template <class F>
void with_config(DType dtype, int dims, const F& f) {
  const auto with_dims = [&](auto element) {
    if (dims <= 64) return f(element, std::integral_constant<int, 64>());
    if (dims <= 128) return f(element, std::integral_constant<int, 128>());
    f(element, std::integral_constant<int, 256>());
  };
  if (dtype == DType::bf16) return with_dims(__nv_bfloat16());
  if (dtype == DType::f16) return with_dims(__half());
  with_dims(float());
}

// The dtype of the kernels for these operands: one that they share, or float32, which reads any.
inline DType dtype_for(std::initializer_list<const Operand*> operands) {
  const DType first = (*operands.begin())->dtype;
  for (const Operand* o : operands) {
    if (o->dtype != first) return DType::f32;
  }
  return first;
}

}  // namespace tilewright::cuda::attention
