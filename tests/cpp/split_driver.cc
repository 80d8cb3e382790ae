// simd/gemm_split.cc alone, for test_split.py: out (32, 32) = a (32, K) @ b (K, 32), K at most KC.
#include <sys/syscall.h>
#include <unistd.h>

#include <vector>

#include "simd/gemm_split.cc"

static bool may_use_tiles() {
#if defined(TILEWRIGHT_EMULATE_AMX)
  return true;
#else
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#endif
}

extern "C" __attribute__((visibility("default"))) int multiply(const float* a, const float* b,
                                                               int64_t K, float* out) {
  using namespace tilewright;
  if (!may_use_tiles()) return 1;
  KernelTable table;
  table.gemm_f32.NR = 32;
  amx::fill_gemm_split(table);
  const GemmKernels& g = table.gemm_split[0];
  const int64_t kc = (K + g.k_step - 1) / g.k_step * g.k_step;
  struct alignas(64) Line {
    char bytes[64];
  };
  const auto lines = [&](int64_t n) { return std::vector<Line>(size_t(n / 64 + 4)); };
  auto panel_a = lines(kc * g.MR * g.a_bytes), panel_b = lines(kc * g.NR * g.prepared_bytes);
  g.pack_a({a, DType::f32, K, 1}, 0, g.MR, 0, K, K, panel_a.data());
  g.prepare({b, g.NR, K, K, true, panel_b.data()}, 0, kc);
  g.begin();
  g.tile(g.MR, K, panel_a.data(), panel_b.data(), g.NR, {out, g.NR});
  g.end();
  return 0;
}
