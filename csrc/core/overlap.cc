// Elements i of a and j of b share a byte where, for some bytes s and t of an element,
//
//   a.data + sum(i_d stride_d) + s  =  b.data + sum(j_d stride_d) + t
//
// Counting axes with negative strides from their other end, and all of b's backwards, makes every
// coefficient positive: sum(c_k x_k) = R with 0 <= x_k <= u_k. The search tries the largest
// coefficient first; what the smaller ones can still reach leaves it one or two choices where
// strides nest, as those of arrays do, and none where their common divisor does not divide the rest.
#include "core/overlap.h"

#include <algorithm>
#include <cstdlib>
#include <numeric>

namespace tilewright {
namespace {

constexpr int kMostTerms = 2 * kMaxRank + 1;
constexpr int kMostSteps = 20000;  // of a search: below 1 ms

// sum(c_k x_k) = R, 0 <= x_k <= u_k
class Equation {
 public:
  void add(int64_t coefficient, int64_t most) {
    if (coefficient == 0 || most == 0) return;
    for (int k = 0; k < count_; ++k) {
      if (terms_[k].coefficient != coefficient) continue;
      terms_[k].most += most;
      return;
    }
    terms_[count_++] = {coefficient, most, 0, 0};
  }

  // Whether it has a solution; true also where that was not found out.
  bool solvable(int64_t R) {
    std::sort(terms_, terms_ + count_,
              [](const Term& a, const Term& b) { return a.coefficient > b.coefficient; });
    int64_t reach = 0, divisor = 0;
    for (int k = count_ - 1; k >= 0; --k) {
      Term& t = terms_[k];
      t.reach_below = reach;
      reach += t.coefficient * t.most;
      t.divisor = divisor = std::gcd(divisor, t.coefficient);
    }
    steps_ = 0;
    return search(0, R);
  }

 private:
  struct Term {
    int64_t coefficient, most;
    int64_t reach_below;  // the largest sum of the terms after this one
    int64_t divisor;      // of this one and those after it
  };

  bool search(int k, int64_t R) {
    if (R == 0) return true;
    if (k == count_ || ++steps_ > kMostSteps) return k < count_;
    const Term& t = terms_[k];
    if (R % t.divisor != 0) return false;
    const int64_t missing = R - t.reach_below;
    const int64_t least = missing > 0 ? (missing + t.coefficient - 1) / t.coefficient : 0;
    for (int64_t x = std::min(t.most, R / t.coefficient); x >= least; --x) {
      if (search(k + 1, R - x * t.coefficient)) return true;
    }
    return false;
  }

  Term terms_[kMostTerms];
  int count_ = 0, steps_ = 0;
};

// A view's addresses, in bytes: low + sum(i_d |stride_d|) to high, all inclusive of whole elements.
struct Extent {
  int64_t low, high;
};

Extent extent(const View& v) {
  int64_t low = 0, high = 1;
  for (int d = 0; d < v.rank; ++d) {
    const int64_t reach = v.stride[d] * (v.shape[d] - 1);
    (reach < 0 ? low : high) += reach;
  }
  const auto base = int64_t(reinterpret_cast<uintptr_t>(v.data));
  return {base + low * dtype_size(v.dtype), base + high * dtype_size(v.dtype)};
}

}  // namespace

bool share_memory(const View& a, const View& b) {
  if (!a || !b || a.size() == 0 || b.size() == 0) return false;
  const Extent ea = extent(a), eb = extent(b);
  if (ea.high <= eb.low || eb.high <= ea.low) return false;
  const int64_t a_size = dtype_size(a.dtype), b_size = dtype_size(b.dtype);
  const int64_t R = eb.high - 1 - ea.low;
  int64_t unit = std::gcd(a_size, b_size);
  if ((eb.low - ea.low) % unit != 0) unit = 1;
  Equation equation;
  for (int d = 0; d < a.rank; ++d) {
    equation.add(std::abs(a.stride[d]) * a_size / unit, a.shape[d] - 1);
  }
  for (int d = 0; d < b.rank; ++d) {
    equation.add(std::abs(b.stride[d]) * b_size / unit, b.shape[d] - 1);
  }
  equation.add(1, a_size / unit - 1 + b_size / unit - 1);
  return equation.solvable((R + 1) / unit - 1);
}

// For each axis: two indices that differ there by 1 or more, by anything on the axes before it, and
// nowhere else. As an equation: |stride_d| (1 + z) = the sum of the other axes' steps, each from
// -(n - 1) to n - 1.
bool overlaps_itself(const View& v) {
  if (v.contiguous() || v.size() == 0) return false;
  for (int d = 0; d < v.rank; ++d) {
    if (v.shape[d] == 1) continue;
    if (v.stride[d] == 0) return true;
    Equation equation;
    int64_t R = -std::abs(v.stride[d]);
    equation.add(std::abs(v.stride[d]), v.shape[d] - 2);
    for (int e = 0; e < d; ++e) {
      const int64_t stride = std::abs(v.stride[e]), most = v.shape[e] - 1;
      equation.add(stride, 2 * most);
      R += stride * most;
    }
    if (R >= 0 && equation.solvable(R)) return true;
  }
  return false;
}

bool same_array(const View& a, const View& b) {
  if (a.data != b.data || a.dtype != b.dtype || a.rank != b.rank) return false;
  for (int d = 0; d < a.rank; ++d) {
    if (a.shape[d] != b.shape[d] || (a.shape[d] > 1 && a.stride[d] != b.stride[d])) return false;
  }
  return true;
}

}  // namespace tilewright
