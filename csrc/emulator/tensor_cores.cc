// ldmatrix and mma.sync, each written from the PTX ISA on its own: tests let them meet.
//
// Products of 16-bit and tf32 operands are exact in float. Their sum is either rounded at each
// addition, or cut as tensor cores cut it (Accumulation in emulator.h): Fasi, Higham, Mikaitis and
// Pranesh, "Numerical behavior of NVIDIA tensor cores" (2021); Ootomo and Yokota, "Recovering
// single precision accuracy from Tensor Cores" (2022).
#include <cstring>

#include "emulator/collectives.h"
#include "emulator/fragments.h"
#include "emulator/memory.h"

namespace tilewright::emulator {
namespace {

template <class T>
using Eight __attribute__((vector_size(8 * sizeof(T)))) = T;
using Floats = Eight<float>;
using Doubles = Eight<double>;
using Bits = Eight<std::int64_t>;

struct MmaArgument {
  void* d;
  const std::uint32_t *a, *b;
};

float bf16_to_float(std::uint16_t bits) {
  const std::uint32_t wide = std::uint32_t{bits} << 16;
  float f;
  std::memcpy(&f, &wide, sizeof f);
  return f;
}

float f16_to_float(std::uint16_t bits) {
  _Float16 h;
  std::memcpy(&h, &bits, sizeof h);
  return static_cast<float>(h);
}

// The hardware ignores the 13 bits that tf32 doesn't have.
float tf32_to_float(std::uint32_t bits) {
  bits &= 0xffffe000u;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

template <float (*widen)(std::uint16_t)>
struct Halves {
  using Element = float;
  static constexpr int n = 2, group = 8;
  static float get(std::uint32_t r, int e) {
    return widen(static_cast<std::uint16_t>(r >> (16 * e)));
  }
};
struct Tf32 {
  using Element = float;
  static constexpr int n = 1, group = 4;
  static float get(std::uint32_t r, int) { return tf32_to_float(r); }
};
// Of T, int8 or uint8; as unsigned numbers, which wrap: the sum's bits are the same.
template <class T>
struct Bytes {
  using Element = std::uint32_t;
  static constexpr int n = 4, group = 0;
  static std::uint32_t get(std::uint32_t r, int e) {
    const auto byte = static_cast<T>(r >> (8 * e));
    return static_cast<std::uint32_t>(std::int32_t{byte});
  }
};

template <class T, int depth>
void add_rounded(const T (&a)[depth], const Eight<T> (&b)[depth], Eight<T>& c) {
  Eight<T> sum = {};
  for (int k = 0; k < depth; ++k) sum += a[k] * b[k];
  c += sum;
}

constexpr std::int64_t kExponent = 0x7ff0000000000000, kSign = INT64_MIN;
constexpr std::int64_t kBelow24Bits = (std::int64_t{1} << 29) - 1;  // of a double's 53

// One step: c and `group` products, cut to multiples of the last of the 24 bits that the largest of
// them has, are added exactly (doubles have room), and the sum is cut to 24 bits.
template <int group>
void add_step(const float* a, const Floats* b, Floats& c) {
  Doubles terms[group + 1], sum = {}, plain = {};
  Bits largest = {};
  for (int k = 0; k <= group; ++k) {
    terms[k] = k < group ? static_cast<double>(a[k]) * __builtin_convertvector(b[k], Doubles)
                         : __builtin_convertvector(c, Doubles);
    const Bits exponent = reinterpret_cast<const Bits&>(terms[k]) & kExponent;
    largest = largest < exponent ? exponent : largest;
    plain += terms[k];
  }
  const Doubles unit = reinterpret_cast<const Doubles&>(largest) * 0x1p-23;
  const Doubles shift = unit * 0x1p52;  // adding it rounds to multiples of unit
  for (const Doubles& term : terms) {
    const Bits sign = reinterpret_cast<const Bits&>(term) & kSign;
    const Bits size_bits = reinterpret_cast<const Bits&>(term) & ~kSign;
    const Doubles size = reinterpret_cast<const Doubles&>(size_bits);
    Doubles cut = (size + shift) - shift;
    cut = cut > size ? cut - unit : cut;
    const Bits signed_cut = reinterpret_cast<const Bits&>(cut) | sign;
    sum += reinterpret_cast<const Doubles&>(signed_cut);
  }
  const Bits cut_sum = reinterpret_cast<const Bits&>(sum) & ~kBelow24Bits;
  const Doubles finite = reinterpret_cast<const Doubles&>(cut_sum);
  c = __builtin_convertvector(largest != kExponent ? finite : plain, Floats);
}

template <int group, int depth>
void add_truncated(const float (&a)[depth], const Floats (&b)[depth], Floats& c) {
  for (int k = 0; k < depth; k += group) add_step<group>(a + k, b + k, c);
}

template <class KindA, class KindB = KindA>
void multiply(std::array<void*, kLanes>& all) {
  using T = typename KindA::Element;
  constexpr int n = KindA::n, group = KindA::group, depth = 8 * n;
  T a[16][depth];
  Eight<T> b[depth], c[16];
  for (int lane = 0; lane < static_cast<int>(kLanes); ++lane) {
    const auto& x = *static_cast<MmaArgument*>(all[static_cast<unsigned>(lane)]);
    for (int e = 0; e < n; ++e) {
      for (int r = 0; r < 4; ++r) {
        const Place p = place_in_a(lane, r, e, n);
        a[p.row][p.column] = KindA::get(x.a[r], e);
      }
      for (int r = 0; r < 2; ++r) {
        const Place p = place_in_b(lane, r, e, n);
        b[p.row][p.column] = KindB::get(x.b[r], e);
      }
    }
    for (int i = 0; i < 4; ++i) {
      const Place p = place_in_c(lane, i);
      T value;
      std::memcpy(&value, static_cast<const T*>(x.d) + i, sizeof value);
      c[p.row][p.column] = value;
    }
  }
  for (int row = 0; row < 16; ++row) {
    if constexpr (group > 0) {
      if (machine.accumulation == Accumulation::truncated) {
        add_truncated<group>(a[row], b, c[row]);
        continue;
      }
    }
    add_rounded<T>(a[row], b, c[row]);
  }
  for (int lane = 0; lane < static_cast<int>(kLanes); ++lane) {
    auto* d = static_cast<T*>(static_cast<MmaArgument*>(all[static_cast<unsigned>(lane)])->d);
    for (int i = 0; i < 4; ++i) {
      const Place p = place_in_c(lane, i);
      const T value = c[p.row][p.column];
      std::memcpy(d + i, &value, sizeof value);
    }
  }
}

}  // namespace

void mma(Mma kind, void* d, const std::uint32_t* a, const std::uint32_t* b, Site site) {
  const Unwatched unwatched;
  MmaArgument mine{d, a, b};
  const auto finish = [kind](auto& all) {
    ++machine.counters.mma;
    switch (kind) {
      case Mma::bf16_m16n8k16:
        return multiply<Halves<bf16_to_float>>(all);
      case Mma::f16_m16n8k16:
        return multiply<Halves<f16_to_float>>(all);
      case Mma::tf32_m16n8k8:
        return multiply<Tf32>(all);
      case Mma::s8_s8_m16n8k32:
        return multiply<Bytes<std::int8_t>>(all);
      case Mma::s8_u8_m16n8k32:
        return multiply<Bytes<std::int8_t>, Bytes<std::uint8_t>>(all);
      case Mma::u8_s8_m16n8k32:
        return multiply<Bytes<std::uint8_t>, Bytes<std::int8_t>>(all);
      case Mma::u8_u8_m16n8k32:
        return multiply<Bytes<std::uint8_t>>(all);
    }
  };
  rendezvous("mma", ~0u, site, &mine, finish, true);
}

void ldmatrix(std::uint32_t* registers, int count, bool transpose, const void* row, Site site) {
  const Unwatched unwatched;
  struct Argument {
    std::uint32_t* out;
    const void* row;
  } mine{registers, row};
  const bool gives_a_row = static_cast<int>(current->lane) < 8 * count;
  if (gives_a_row) {
    shared_offset(row, 16, "ldmatrix", site);
    touch(row, 16, Access::read, site, false);
  }
  const auto finish = [=](auto& all) {
    unsigned wavefronts = 0;
    for (int i = 0; i < count; ++i) {
      std::uint16_t matrix[8][8];
      std::uintptr_t offsets[8];
      for (int r = 0; r < 8; ++r) {
        const void* from = static_cast<Argument*>(all[static_cast<unsigned>(8 * i + r)])->row;
        offsets[r] = shared_offset(from, 16, "ldmatrix", site);
        std::memcpy(matrix[r], from, 16);
      }
      for (unsigned lane = 0; lane < kLanes; ++lane) {
        const unsigned r = lane / 4, c = lane % 4 * 2;
        const std::uint32_t low = transpose ? matrix[c][r] : matrix[r][c];
        const std::uint32_t high = transpose ? matrix[c + 1][r] : matrix[r][c + 1];
        static_cast<Argument*>(all[lane])->out[i] = low | high << 16;
      }
      wavefronts += row_wavefronts(offsets, 8);
    }
    count_ldmatrix(site, wavefronts, static_cast<unsigned>(count));
  };
  rendezvous("ldmatrix", ~0u, site, &mine, finish, true);
}

}  // namespace tilewright::emulator
