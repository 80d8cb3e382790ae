// What a kernel's counters must say: shared memory without bank conflicts, global memory by whole
// sectors, and tensor cores that don't wait for shared memory.
#pragma once
#include <string>

#include "cuda/gpu/gpu.h"
#include "test.h"

// Of each line of the kernels: no access meets a bank twice, and 90 % of the sectors' bytes are
// asked for. Plain loads and stores are counted in checked kernels only.
inline void check_traffic(const tilewright::emulator::Counters& counters, const char* file,
                          int line, const std::string& what) {
  if (counters.ldmatrix_wavefronts != counters.ldmatrix_ideal) {
    test::fail(file, line, "ldmatrix conflicts: " + what);
  }
  for (const tilewright::emulator::SiteCounters& site : counters.sites) {
    const bool conflicts = site.wavefronts > site.ideal_wavefronts;
    const bool waste = 0.9 * double(site.sectors) > double(site.ideal_sectors);
    if (!conflicts && !waste) continue;
    test::fail(file, line,
               site.where + (conflicts ? " conflicts" : " wastes sectors") + ": " + what);
  }
}

// Tensor cores' cycles for each cycle of shared memory, of what `longer` did beyond `shorter`: the
// same kernel with a shorter main loop. On sm_80 an mma of 16 x 8 x 16 elements of 16 bits, or of
// 16 x 8 x 32 of 8 bits, takes 2 cycles (1024 and 2048 multiply-adds a cycle of an SM), and a
// wavefront 1.
inline double tensor_cycles_per_shared_cycle(const tilewright::emulator::Counters& longer,
                                             const tilewright::emulator::Counters& shorter) {
  const auto wavefronts = [](const tilewright::emulator::Counters& counters) {
    std::uint64_t sum = 0;
    for (const auto& site : counters.sites) sum += site.wavefronts;
    return double(sum);
  };
  return 2 * double(longer.mma - shorter.mma) / (wavefronts(longer) - wavefronts(shorter));
}
