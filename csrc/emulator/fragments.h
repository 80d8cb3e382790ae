// Which element of a tile each lane's register holds: PTX ISA, "Matrix Fragments for mma.m16n8k8",
// ".m16n8k16" and ".m16n8k32". One rule serves all of them, with n elements in a register (1 of 32
// bits, 2 of 16, 4 of 8) and a depth of K = 8 n:
//
//   A (16 x K)   register r = 0..3   row g + 8 (r % 2)     column n t + e + K/2 (r / 2)
//   B (K x 8)    register r = 0..1   row n t + e + K/2 r   column g
//   C (16 x 8)   register i = 0..3   row g + 8 (i / 2)     column 2 t + i % 2
//
// where g = lane / 4, t = lane % 4, and e = 0..n-1 is the element in the register, lowest first.
#pragma once

namespace tilewright::emulator {

struct Place {
  int row, column;
};

constexpr Place place_in_a(int lane, int r, int e, int n) {
  return {lane / 4 + 8 * (r % 2), n * (lane % 4) + e + 4 * n * (r / 2)};
}
constexpr Place place_in_b(int lane, int r, int e, int n) {
  return {n * (lane % 4) + e + 4 * n * r, lane / 4};
}
constexpr Place place_in_c(int lane, int i) {
  return {lane / 4 + 8 * (i / 2), 2 * (lane % 4) + i % 2};
}

}  // namespace tilewright::emulator
