// On x86-64 a switch is 15 instructions: push what a callee must preserve, exchange stack pointers,
// pop, return. ucontext, which others use (and TILEWRIGHT_EMULATOR_UCONTEXT asks for), also saves
// the signal mask by a system call each time: kernels then took five to seven times as long.
#include "emulator/fibers.h"

#if !defined(__x86_64__) && !defined(TILEWRIGHT_EMULATOR_UCONTEXT)
#define TILEWRIGHT_EMULATOR_UCONTEXT 1
#endif

#ifdef TILEWRIGHT_EMULATOR_UCONTEXT
#include <ucontext.h>
#endif

namespace tilewright::emulator {

#ifdef TILEWRIGHT_EMULATOR_UCONTEXT

void switch_stack(void** save, void* load) {
  ucontext_t here;
  *save = &here;
  swapcontext(&here, static_cast<ucontext_t*>(load));
}

void* fresh_stack(char* low, char* top, void (*entry)()) {
  // The context lies at the top, away from the guard page that `low` may begin with.
  auto* context = reinterpret_cast<ucontext_t*>(top - (sizeof(ucontext_t) + 63) / 64 * 64);
  getcontext(context);
  context->uc_stack.ss_sp = low;
  context->uc_stack.ss_size = static_cast<unsigned long>(reinterpret_cast<char*>(context) - low);
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  return context;
}

#else

extern "C" void tilewright_emulator_switch(void** save, void* load);
asm(R"(
.text
.globl tilewright_emulator_switch
.hidden tilewright_emulator_switch
.type tilewright_emulator_switch,@function
tilewright_emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size tilewright_emulator_switch, .-tilewright_emulator_switch
)");

void switch_stack(void** save, void* load) {
  tilewright_emulator_switch(save, load);
}

void* fresh_stack(char*, char* top, void (*entry)()) {
  auto** sp = reinterpret_cast<void**>(top);
  *--sp = nullptr;  // where `entry` would return to: unwinding ends here
  *--sp = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--sp = nullptr;  // the six registers that the switch pops
  return sp;
}

#endif

}  // namespace tilewright::emulator
