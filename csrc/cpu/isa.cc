#include "cpu/isa.h"

#include <atomic>
#include <mutex>

#include "core/check.h"
#include "core/env.h"
#include "core/options.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#elif defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace tilewright {
namespace {

#if defined(__x86_64__)
// The register state that the operating system saves (XCR0): a CPU flag alone is not permission.
uint64_t saved_state() {
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return 0;
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t(high) << 32 | low;
}

bool has_avx2() {
  uint32_t a, b, c, d;
  if ((saved_state() & 0x6) != 0x6) return false;  // XMM, YMM
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_FMA) || !(c & bit_F16C)) return false;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & bit_AVX2) && (b & bit_BMI2);
}

bool has_avx512() {
  uint32_t a, b, c, d;
  if (!has_avx2() || (saved_state() & 0xe6) != 0xe6) return false;  // and opmask, ZMM
  constexpr uint32_t wanted = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & wanted) == wanted;
}

bool has_avx512_vnni() {
  uint32_t a, b, c, d;
  return has_avx512() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (c & bit_AVX512VNNI);
}

bool has_avx512_bf16() {
  uint32_t a, b, c, d;
  return has_avx512_vnni() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & bit_AVX512BF16);
}

// The tiles' 8 KB of state are a process's only once it has asked the kernel, which may refuse.
bool may_use_tiles() {
#if defined(TILEWRIGHT_EMULATE_AMX)
  return true;
#endif
  constexpr int kRequestPermission = 0x1023,
                kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
}

#if defined(TILEWRIGHT_EMULATE_AMX)
bool has_amx() {
  return has_avx512_bf16();  // the rest of the level's instructions
}
#else
bool has_amx() {
  uint32_t a, b, c, d;
  if (!has_avx512_bf16() || (saved_state() & 0x60000) != 0x60000) return false;  // tiles
  constexpr uint32_t wanted = 1u << 22 | 1u << 24 | 1u << 25;  // AMX-BF16, AMX-TILE, AMX-INT8
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & wanted) == wanted;
}
#endif
#endif

struct Level {
  const char* name;
  bool (*supported)();
  void (*fill)(KernelTable&);  // nullptr: not compiled
};

#define TILEWRIGHT_FILL(level)       \
  [](KernelTable& table) {           \
    table.isa = #level;              \
    level::fill_gemm(table);         \
    level::fill_roofline(table);     \
    level::fill_roofline_dot(table); \
    level::fill_elementwise(table);  \
    level::fill_layernorm(table);    \
    level::fill_qgemm(table);        \
    level::fill_weights(table);      \
    level::fill_quantize(table);     \
    level::fill_softmax(table);      \
    level::fill_optim(table);        \
    level::fill_dropout(table);      \
    level::fill_rope(table);         \
    level::fill_mse(table);          \
    level::fill_attention(table);    \
    level::fill_decode(table);       \
  }

const Level kLevels[] = {
    {"generic", [] { return true; }, TILEWRIGHT_FILL(generic)},
#if defined(TILEWRIGHT_HAS_avx2)
    {"avx2", has_avx2, TILEWRIGHT_FILL(avx2)},
    {"avx512", has_avx512, TILEWRIGHT_FILL(avx512)},
    {"avx512_vnni", has_avx512_vnni,
     [](KernelTable& table) {
       table.isa = "avx512_vnni";
       avx512_vnni::fill_qgemm(table);
       avx512_vnni::fill_qgemm_vnni(table);
       avx512_vnni::fill_roofline_dot(table);
     }},
    {"avx512_bf16", has_avx512_bf16,
     [](KernelTable& table) {
       table.isa = "avx512_bf16";
       avx512_bf16::fill_gemm_bf16(table);
       avx512_bf16::fill_roofline_dot(table);
     }},
    {"amx", [] { return has_amx() && may_use_tiles(); },
     [](KernelTable& table) {
       table.isa = "amx";
       amx::fill_gemm_amx(table);
       amx::fill_gemm_split(table);
       amx::fill_attention_amx(table);
       amx::fill_roofline_amx(table);
     }},
#elif defined(TILEWRIGHT_HAS_neon)
    {"neon", [] { return true; }, TILEWRIGHT_FILL(neon)},  // part of the architecture
    {"neon_dot", [] { return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0; },
     [](KernelTable& table) {
       table.isa = "neon_dot";
       neon_dot::fill_qgemm_dot(table);
     }},
#endif
};
constexpr int kNumLevels = sizeof kLevels / sizeof kLevels[0];

// One table per level, filled when it is first chosen. The fill functions are themselves compiled
// for their level: none may run on a CPU that lacks it.
const KernelTable& table_of(int index) {
  static KernelTable tables[kNumLevels];
  static std::once_flag filled[kNumLevels];
  std::call_once(filled[index], [&] {
    for (int i = 0; i <= index; ++i) kLevels[i].fill(tables[index]);
  });
  return tables[index];
}

std::atomic<const KernelTable*> g_active{nullptr};

const KernelTable& select(const std::string& name) {
  std::string choices;
  for (int i = kNumLevels - 1; i >= 0; --i) {
    if (!kLevels[i].supported()) continue;
    if (name.empty() || name == kLevels[i].name) return table_of(i);
    choices = std::string(kLevels[i].name) + (choices.empty() ? "" : ", ") + choices;
  }
  throw UnsupportedError("isa: level must be one of " + choices + " on this machine, got '" + name +
                         "'" + (refusal() ? std::string("; ") + refusal() : std::string()));
}

}  // namespace

const char* refusal() {
#if defined(__x86_64__)
  if (has_amx() && !may_use_tiles()) {
    return "the system refuses AMX to this process (arch_prctl, ARCH_REQ_XCOMP_PERM)";
  }
#endif
  return nullptr;
}

const KernelTable& kernels_of(const std::string& name) {
  return select(name);
}

const KernelTable& kernels() {
  if (const KernelTable* here = call_options().kernels) return *here;
  const KernelTable* t = g_active.load(std::memory_order_acquire);
  if (!t) g_active.store(t = &select(env::get("TILEWRIGHT_ISA")));
  return *t;
}

void set_isa(const std::string& name) {
  g_active.store(&select(name));
}

std::vector<IsaLevel> isa_levels() {
  std::vector<IsaLevel> levels;
  const KernelTable& active = kernels();
  for (int i = 0; i < kNumLevels; ++i) {
    levels.push_back({kLevels[i].name, kLevels[i].fill != nullptr, kLevels[i].supported(),
                      std::string(active.isa) == kLevels[i].name});
  }
  return levels;
}

}  // namespace tilewright
