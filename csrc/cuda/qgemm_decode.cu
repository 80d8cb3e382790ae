// Few rows of floats times quantized weights that lie along K: a step of decoding.
//
//     out (M, N) = a (M, K) b (K, N)        M <= 8; b(k, j) = scale(k / group, j) * q(k, j) + offset
//
//            chain 0     chain 1           A block: 16 columns, all of K, a round of 16 chains after
//          +-----------+-----------+--     the other. A warp: two chains of each column, 32 bytes of
//     j    | lanes 2j  | lanes 2j+1|       weights of both at a time. A lane owns one of them; what
//     j+1  | ...       |           |       two lanes read side by side is 32 bytes of one chain, so
//          +-----------+-----------+--     halves change hands, and every sector is used whole.
//
// Parameter        bounded by
// columns = 16     lanes: two for each. 256 blocks of 4096 columns fill every card's processors
// warps = 8        16 chains at once are K = 4096; 8 KiB on their way a block hide memory's latency
//                  with two blocks a processor
// rows M           registers and shared memory: a step of a, 64 numbers of 2 chains, for each warp
//
// The weights' bytes bound it, each read once, and a, from the L2 cache, once a block.
//
// Numerics: matmul_ffma.cu's, bit by bit: chains of 256 fused multiply-adds, in ascending order of k,
// added in ascending order. Chains don't know of each other until then, so many are computed at once.
// Not handled: weights that lie along N, groups that no 16 weights fill; matmul_ffma.cu does these.
#include "cuda/matmul.h"

namespace tilewright::cuda {
namespace {

constexpr int kColumns = 16, kWarps = 8, kThreads = 32 * kWarps, kAtOnce = 2 * kWarps;
constexpr int kMostRows = 8;
constexpr int kPart = 16;  // weights that share a scale

// Weights of a lane in a step: two times 16 bytes.
template <int bits>
constexpr int kStep = 32 * 8 / bits;

template <int kRows, int bits>
struct Shared {
  float a[kWarps][kRows][2][kStep<bits> + 4];  // the padding keeps chains in different banks
  float sum[kAtOnce][kRows][kColumns];
};

// Bytes of one line, of which there are `bytes`: 16 from `at` on.
__device__ inline uint4 load_weights(const std::uint8_t* line, std::int64_t at,
                                     std::int64_t bytes) {
  return at < bytes ? gpu::load<uint4>(line + at) : make_uint4(0, 0, 0, 0);
}

__device__ inline uint4 from_neighbour(const uint4& x) {
  return make_uint4(__shfl_xor_sync(kAllLanes, x.x, 1), __shfl_xor_sync(kAllLanes, x.y, 1),
                    __shfl_xor_sync(kAllLanes, x.z, 1), __shfl_xor_sync(kAllLanes, x.w, 1));
}

// a or b, word by word: of two structs nvcc would choose the address, and keep both in memory.
__device__ inline uint4 chosen(bool first, const uint4& a, const uint4& b) {
  return make_uint4(first ? a.x : b.x, first ? a.y : b.y, first ? a.z : b.z, first ? a.w : b.w);
}

// Weight i of a word.
template <int bits>
__device__ inline float weight(std::uint32_t word, int i, bool is_signed) {
  const int up = static_cast<int>(word << (32 - bits - bits * i));
  return static_cast<float>(is_signed
                                ? up >> (32 - bits)
                                : static_cast<int>(static_cast<std::uint32_t>(up) >> (32 - bits)));
}

template <int kRows, int bits>
__global__ void __launch_bounds__(kThreads, 2)  // left to itself, ptxas spills for a third block
    decode_kernel(const __grid_constant__ Product p, const __grid_constant__ Weights b) {
  constexpr int N = kStep<bits>, kInWord = 32 / bits, kWords = kPart / kInWord;
  auto& shared = gpu::shared_memory<Shared<kRows, bits>>();
  const Place place = place_of(p, kRows, kColumns);
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int own = lane % 2;  // which of the warp's chains
  const std::int64_t column = min(place.column + lane / 2, p.N - 1);
  const std::int64_t bytes = p.K * bits / 8, chains = (p.K + kChain - 1) / kChain;
  const auto* const line = static_cast<const std::uint8_t*>(b.data) + column * b.line_stride;
  auto& a = shared.a[warp];
  const int of_sum = static_cast<int>(threadIdx.x);  // a row and column that this thread adds up
  float total = 0.0f;

  for (std::int64_t round = 0; round < chains; round += kAtOnce) {
    const std::int64_t first = (round + 2 * warp) * kChain;  // k of the warp's chains
    float chain[kRows] = {};
    for (int step = 0; step < kChain / N; ++step) {  // as often for all: beyond K there are zeros
      const std::int64_t k0 = first + step * N;
      // 1. Weights: 32 bytes of each chain by two lanes; a lane keeps those of its own.
      const std::int64_t at = k0 * bits / 8 + 16 * own;
      const uint4 of_first = load_weights(line, at, bytes);
      const uint4 of_second = load_weights(line, at + kChain * bits / 8, bytes);
      const uint4 got = from_neighbour(chosen(own, of_first, of_second));
      uint4 low = chosen(own, got, of_first), high = chosen(own, of_second, got);
      // 2. a, for both chains.
      __syncwarp();
#pragma unroll 1
      for (int i = lane; i < kRows * 2 * N; i += 32) {
        const int row = i / (2 * N), chain_of = i / N % 2;
        const std::int64_t k = k0 + chain_of * kChain + i % N;
        const bool inside = place.row + row < p.M && k < p.K;
        a[row][chain_of][i % N] = inside ? place.a.at<float>(place.row + row, k) : 0.0f;
      }
      __syncwarp();
      // 3. Products, by what shares a scale; words move down, so that the next ones are the first.
      const std::int64_t k_own = k0 + own * kChain;
#pragma unroll 1
      for (int part = 0; part < N; part += kPart) {
        if (k_own + part >= p.K) break;
        const auto group =
            static_cast<std::uint32_t>(k_own + part) / static_cast<std::uint32_t>(b.group);
        const float scale = b.scale.at(group, column);
        const float offset = b.offset.data ? b.offset.at(group, column) : 0.0f;
        const std::uint32_t word[4] = {low.x, low.y, low.z, low.w};
#pragma unroll
        for (int i = 0; i < kPart; i += 4) {
          float x[4];
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float q = weight<bits>(word[(i + e) / kInWord], (i + e) % kInWord, b.is_signed);
            x[e] = b.offset.data ? fmaf(scale, q, offset) : scale * q;
          }
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            const float4 four = gpu::load<float4>(&a[r][own][part + i]);
            chain[r] = fmaf(four.w, x[3],
                            fmaf(four.z, x[2], fmaf(four.y, x[1], fmaf(four.x, x[0], chain[r]))));
          }
        }
        low = kWords == 4 ? high : make_uint4(low.z, low.w, high.x, high.y);
        high.x = high.z, high.y = high.w;
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) shared.sum[2 * warp + own][r][lane / 2] = chain[r];
    __syncthreads();
    if (of_sum < kRows * kColumns) {
      for (int c = 0; c < kAtOnce && round + c < chains; ++c) {
        total += shared.sum[c][of_sum / kColumns][of_sum % kColumns];
      }
    }
    __syncthreads();
  }

  // 4. The epilogue, of four neighbours at a time.
  if (of_sum < kRows * kColumns) shared.sum[0][of_sum / kColumns][of_sum % kColumns] = total;
  __syncthreads();
  const int row = of_sum / (kColumns / 4), four = of_sum % (kColumns / 4) * 4;
  if (row >= kRows || place.row + row >= p.M || place.column + four >= p.N) return;
  Four<float> y = gpu::load<Four<float>>(&shared.sum[0][row][four]);
  store_sums(p, place, place.row + row, place.column + four, y.x);
}

template <int kRows, int bits>
void launch(const Product& p, const Weights& b) {
  gpu::launch("qgemm_decode", decode_kernel<kRows, bits>, dim3(blocks_of(p, kRows, kColumns)),
              dim3(kThreads), sizeof(Shared<kRows, bits>), gpu::current_stream(), p, b);
}

template <int bits>
void launch_for_rows(const Product& p, const Weights& b) {
  if (p.M == 1) return launch<1, bits>(p, b);
  if (p.M == 2) return launch<2, bits>(p, b);
  if (p.M <= 4) return launch<4, bits>(p, b);
  launch<kMostRows, bits>(p, b);
}

}  // namespace

bool is_decode(const Product& p, const Weights& b) {
  const auto begin = reinterpret_cast<std::uintptr_t>(b.data);
  return p.M <= kMostRows && p.K <= INT32_MAX && b.k_stride == 1 && begin % 16 == 0 &&
         b.line_stride % 16 == 0 && p.K * b.bits / 8 % 16 == 0 &&
         (b.groups <= 1 || b.group % kPart == 0);
}

void qgemm_decode(const Product& p, const Weights& b) {
  b.bits == 4 ? launch_for_rows<4>(p, b) : launch_for_rows<8>(p, b);
}

}  // namespace tilewright::cuda
