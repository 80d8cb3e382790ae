// Functions of csrc/simd by themselves, on every level that this CPU has: random words. How
// accurate the elementary functions are, test_accuracy.cc checks.
#include <cstring>

#include "guarded.h"
#include "simd_levels.h"
#include "test.h"

namespace {

template <class F>
void for_each_simd(const F& f) {
  for (const SimdFunctions& s : test::simd_levels()) f(s);
}

struct KnownAnswer {
  uint32_t counter[4];
  uint64_t seed;
  uint32_t words[4];
};

// From the file kat_vectors of Random123, the authors' library: philox4x32, 10 rounds.
const KnownAnswer kKnown[] = {
    {{0, 0, 0, 0}, 0, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
    {{~0u, ~0u, ~0u, ~0u}, ~uint64_t(0), {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
    {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
     0x299f31d0a4093822,
     {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
};

}  // namespace

TEST(philox_gives_the_published_answers) {
  for_each_simd([](const SimdFunctions& s) {
    for (const KnownAnswer& known : kKnown) {
      uint32_t block[4];
      std::memcpy(block, known.counter, sizeof block);
      s.philox_block(block, known.seed);
      CHECK(std::memcmp(block, known.words, sizeof block) == 0);
    }
  });
}

// Whatever range an element is asked for in, it has the word of its own block, and nothing outside
// of the range is written.
TEST(words_follow_from_seed_and_element_alone) {
  for_each_simd([](const SimdFunctions& s) {
    const uint64_t seed = 0x0123456789abcdef;
    for (const uint64_t base : {uint64_t(0), uint64_t(40), (uint64_t(1) << 34) - 70}) {
      for (int64_t skip = 0; skip < 5; ++skip) {
        for (const int64_t n : {0, 1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 200}) {
          const test::Guarded memory(n * 4);
          auto* words = memory.as<uint32_t>();
          const uint64_t first = base + uint64_t(skip);
          s.philox_words(seed, first, n, words);
          for (int64_t i = 0; i < n; ++i) {
            const uint64_t element = first + uint64_t(i), block = element / 4;
            uint32_t want[] = {uint32_t(block), uint32_t(block >> 32), 0, 0};
            s.philox_block(want, seed);
            CHECK(words[i] == want[element % 4]);
          }
        }
      }
    }
  });
}
