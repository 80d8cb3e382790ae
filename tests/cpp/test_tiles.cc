// The emulated tiles against the manual's operations written out, and against a CPU's own where it has
// them. Empty where the level's other instructions are missing.
#include <cmath>
#include <cstring>
#include <random>

#include "cpu/isa.h"
#include "test.h"

extern "C" void multiply_emulated(int type, const void* a, const void* b, void* sum);
extern "C" void multiply_on_tiles(int type, const void* a, const void* b, void* sum);

namespace {

bool supports(const std::string& wanted) {
  for (const tilewright::IsaLevel& level : tilewright::isa_levels()) {
    if (level.name == wanted) return level.supported;
  }
  return false;
}

using Tile = uint32_t[16][16];

void fill(Tile& tile, std::mt19937& random) {
  for (auto& line : tile) {
    for (uint32_t& word : line) word = uint32_t(random());
  }
}

// Numbers between 2^-66 and 2^66, some of them zero or subnormal.
void fill_bf16(Tile& tile, std::mt19937& random) {
  fill(tile, random);
  for (auto& line : tile) {
    for (uint32_t& word : line) {
      word = (word & 0xbfffbfff) | 0x20002000;
      if (random() % 8 == 0) word &= 0x807fffff;
    }
  }
}

float flushed(float x) {
  return std::abs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x;
}

float bf16_of(uint32_t word, int half) {
  const uint32_t bits = half ? word & 0xffff0000 : word << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return flushed(x);
}

float sum_bf16(const Tile& a, const Tile& b, int i, int j, float sum) {
  float halves[2] = {};
  for (int k = 0; k < 16; ++k) {
    for (int h = 0; h < 2; ++h) {
      halves[h] = flushed(std::fma(bf16_of(a[i][k], h), bf16_of(b[k][j], h), halves[h]));
    }
  }
  return flushed(sum + flushed(halves[0] + halves[1]));
}

uint32_t sum_bytes(const Tile& a, const Tile& b, int i, int j, uint32_t sum, bool is_signed) {
  for (int k = 0; k < 16; ++k) {
    for (int e = 0; e < 4; ++e) {
      const auto x = uint8_t(a[i][k] >> 8 * e), y = uint8_t(b[k][j] >> 8 * e);
      sum += uint32_t((is_signed ? int8_t(x) : int(x)) * int8_t(y));
    }
  }
  return sum;
}

}  // namespace

TEST(bytes_add_up_modulo_two_to_the_32) {
  if (!supports("avx512_bf16")) return;
  std::mt19937 random(1);
  for (int type : {1, 2}) {
    alignas(64) Tile a, b, before, after;
    for (Tile* tile : {&a, &b, &before}) fill(*tile, random);
    std::memset(a[0], 0x80, sizeof a[0]);  // -128 or 128, against -128
    for (auto& line : b) line[0] = 0x80808080;
    std::memcpy(after, before, sizeof after);
    multiply_emulated(type, a, b, after);
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < 16; ++j) {
        CHECK(after[i][j] == sum_bytes(a, b, i, j, before[i][j], type == 1));
      }
    }
    if (!supports("amx")) continue;
    multiply_on_tiles(type, a, b, before);
    CHECK(std::memcmp(before, after, sizeof after) == 0);
  }
}

TEST(bfloat16_rounds_as_the_manual_says) {
  if (!supports("avx512_bf16")) return;
  std::mt19937 random(2);
  for (int round = 0; round < 20; ++round) {
    alignas(64) Tile a, b;
    alignas(64) float before[16][16] = {}, after[16][16], own[16][16];
    fill_bf16(a, random);
    fill_bf16(b, random);
    if (round % 2) {
      for (auto& line : before) {
        for (float& x : line) x = std::ldexp(float(random()), int(random() % 60) - 60);
      }
    }
    std::memcpy(after, before, sizeof after);
    std::memcpy(own, before, sizeof own);
    multiply_emulated(0, a, b, after);
    if (supports("amx")) multiply_on_tiles(0, a, b, own);
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < 16; ++j) {
        CHECK(after[i][j] == sum_bf16(a, b, i, j, before[i][j]));
        if (!supports("amx")) continue;
        // What a CPU rounds between the steps is its own affair.
        double terms = std::abs(before[i][j]);
        for (int k = 0; k < 16; ++k) {
          for (int h = 0; h < 2; ++h) {
            terms += std::abs(double(bf16_of(a[i][k], h)) * double(bf16_of(b[k][j], h)));
          }
        }
        CHECK(std::abs(double(own[i][j]) - double(after[i][j])) <= 36 * 0x1p-23 * terms + 0x1p-120);
      }
    }
  }
}
