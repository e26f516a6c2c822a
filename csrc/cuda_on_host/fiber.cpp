// Stacks and the switch between fibers (see fiber.h).
#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_on_host {

static std::vector<char*> free_stacks;

char* take_stack() {
  if (free_stacks.empty()) {
    constexpr size_t kStacks = 64;
    void* memory = mmap(nullptr, kStacks * kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    for (size_t i = 0; i < kStacks; i++) free_stacks.push_back(static_cast<char*>(memory) + i * kStackBytes);
  }
  char* stack = free_stacks.back();
  free_stacks.pop_back();
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(stack, kStackBytes);  // what a previous fiber left
#endif
  return stack;
}

void release_stack(char* stack) { free_stacks.push_back(stack); }

#ifdef DLKERN_UCONTEXT

void prepare_fiber(Fiber& fiber, void (*entry)(), unsigned stagger) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStackBytes - (stagger % 48) * 192;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
}

static void jump(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

#else

// void dlkern_switch_stack(void** save_here, void* continue_there): pushes the registers that a function must keep,
// swaps stacks, pops those of the other side and returns there.
extern "C" [[gnu::visibility("hidden")]] void dlkern_switch_stack(void** save_here, void* continue_there);
asm(R"(
  .text
  .globl dlkern_switch_stack
  .hidden dlkern_switch_stack
  .type dlkern_switch_stack, @function
dlkern_switch_stack:
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
  .size dlkern_switch_stack, .-dlkern_switch_stack
)");

void prepare_fiber(Fiber& fiber, void (*entry)(), unsigned stagger) {
  void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes - 64 - (stagger % 48) * 192);
  *--top = nullptr;                              // entry() has nowhere to return to; also aligns its stack
  *--top = reinterpret_cast<void*>(entry);       // where the first switch "returns" to
  for (int i = 0; i < 6; i++) *--top = nullptr;  // rbp, rbx, r12-r15
  fiber.stack_pointer = top;
}

static void jump(Fiber& from, Fiber& to) { dlkern_switch_stack(&from.stack_pointer, to.stack_pointer); }

#endif

// AddressSanitizer must be told whose stack is in use.
void switch_fiber(Fiber& from, Fiber& to, [[maybe_unused]] bool last) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(last ? nullptr : &from.sanitizer_state, to.stack ? to.stack : to.sanitizer_bottom,
                                 to.stack ? kStackBytes : to.sanitizer_bytes);
#endif
  jump(from, to);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(from.sanitizer_state, nullptr, nullptr);
#endif
}

void fiber_started([[maybe_unused]] Fiber& launcher) {
#ifdef __SANITIZE_ADDRESS__
  const void* bottom = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  // The first fiber of a launch comes from the launcher's stack, later ones from another fiber's.
  if (!launcher.sanitizer_bottom) launcher.sanitizer_bottom = bottom, launcher.sanitizer_bytes = bytes;
#endif
}

}  // namespace cuda_on_host
