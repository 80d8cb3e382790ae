// What g++ -fsanitize=thread calls before each load and store of a kernel, in place of libtsan,
// which is not linked. Hidden, so that a program with the real libtsan elsewhere keeps its own.
#include "emulator/machine.h"

// NOLINTBEGIN(bugprone-reserved-identifier): the compiler chose the names.
using tilewright::emulator::access;
using tilewright::emulator::Access;
using tilewright::emulator::Site;

namespace {

// What the compiler doesn't know to be aligned, nvcc moves byte by byte.
void access_bytes(void* p, unsigned bytes, Access kind, Site site) {
  for (unsigned i = 0; i < bytes; ++i) access(static_cast<char*>(p) + i, 1, kind, site);
}

}  // namespace

#define HOOK extern "C" __attribute__((visibility("hidden")))
#define HERE Site{__builtin_return_address(0), 0}
#define READ_WRITE(n)                            \
  HOOK void __tsan_read##n(void* p) {            \
    access(p, n, Access::read, HERE);            \
  }                                              \
  HOOK void __tsan_write##n(void* p) {           \
    access(p, n, Access::write, HERE);           \
  }                                              \
  HOOK void __tsan_volatile_read##n(void* p) {   \
    access(p, n, Access::read, HERE);            \
  }                                              \
  HOOK void __tsan_volatile_write##n(void* p) {  \
    access(p, n, Access::write, HERE);           \
  }                                              \
  HOOK void __tsan_unaligned_read##n(void* p) {  \
    access_bytes(p, n, Access::read, HERE);      \
  }                                              \
  HOOK void __tsan_unaligned_write##n(void* p) { \
    access_bytes(p, n, Access::write, HERE);     \
  }
READ_WRITE(1)
READ_WRITE(2)
READ_WRITE(4)
READ_WRITE(8)
READ_WRITE(16)
// Of atomics only what host code beside the kernels needs for its function-local statics: kernels
// use CUDA's atomicAdd and its like.
HOOK unsigned char __tsan_atomic8_load(const volatile unsigned char* p, int) {
  return __atomic_load_n(p, __ATOMIC_SEQ_CST);
}
HOOK void __tsan_read_range(void* p, unsigned long n) {
  access(p, n, Access::read, HERE);
}
HOOK void __tsan_write_range(void* p, unsigned long n) {
  access(p, n, Access::write, HERE);
}
HOOK void __tsan_func_entry(void*) {}
HOOK void __tsan_func_exit() {}
HOOK void __tsan_vptr_update(void**, void*) {}
HOOK void __tsan_vptr_read(void**) {}
HOOK void __tsan_init() {
  tilewright::emulator::instrumented = true;
}
// NOLINTEND(bugprone-reserved-identifier)
