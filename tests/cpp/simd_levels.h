// The SimdFunctions of every level that this CPU supports.
#pragma once
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "simd_functions.h"

namespace test {

inline std::vector<SimdFunctions> simd_levels() {
  std::vector<SimdFunctions> compiled = {tilewright::generic::test_functions()}, found;
#if defined(TILEWRIGHT_HAS_avx2)
  compiled.push_back(tilewright::avx2::test_functions());
  compiled.push_back(tilewright::avx512::test_functions());
#elif defined(TILEWRIGHT_HAS_neon)
  compiled.push_back(tilewright::neon::test_functions());
#endif
  for (const tilewright::IsaLevel& level : tilewright::isa_levels()) {
    for (const SimdFunctions& s : compiled) {
      if (level.supported && level.name == std::string(s.isa)) found.push_back(s);
    }
  }
  return found;
}

}  // namespace test
