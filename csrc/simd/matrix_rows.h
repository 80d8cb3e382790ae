// The left operand of a register tile where it is: the words of some rows of a matrix, for one k after
// the other, each to be multiplied into whole vectors.
#pragma once
#include "simd/vec.h"

namespace tilewright::ISA {
namespace {

template <int Rows>
struct MatrixRows {
  static constexpr bool kPacked = false;
  const float* at[(Rows + 2) / 3];  // three rows each: as many as an address reaches
  int64_t row;

  struct Words {
    const MatrixRows& rows;
    int ahead;
    TW_INLINE Vec operator[](int i) const {
      return broadcast(rows.at[i / 3][i % 3 * rows.row + ahead]);
    }
  };

  TW_INLINE MatrixRows(const float* a, int64_t stride) : row(stride) {
    for (int i = 0; i < Rows; i += 3) at[i / 3] = a + i * stride;
  }
  TW_INLINE Words words(int ahead = 0) const { return {*this, ahead}; }
  TW_INLINE void step(int count = 1) {
    for (auto& p : at) p += count;
  }
};

}  // namespace
}  // namespace tilewright::ISA
