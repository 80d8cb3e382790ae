// For test_tiles.cc: one product of tiles, compiled for the level amx as TILES names it, with the
// emulated tiles or the CPU's.
#include "simd/tiles.h"

namespace tilewright::ISA {
namespace {

template <Words w>
void multiply(const void* a, const void* b, void* sum) {
  begin_tiles();
  load_tile<0>(sum, 64);
  load_tile<1>(a, 64);
  stream_tile<2>(b, 64);
  multiply_tiles<w, 0, 1, 2>();
  store_tile<0>(sum, 64);
  end_tiles();
}

}  // namespace
}  // namespace tilewright::ISA

// sum (16, 16) += a (16, 64 bytes) * b (16, 64 bytes). `type`: bfloat16, int8, or uint8 with int8.
extern "C" void TILES(int type, const void* a, const void* b, void* sum) {
  using namespace tilewright::ISA;
  if (type == 0) return multiply<Words::bf16>(a, b, sum);
  type == 1 ? multiply<Words::s8>(a, b, sum) : multiply<Words::u8>(a, b, sum);
}
