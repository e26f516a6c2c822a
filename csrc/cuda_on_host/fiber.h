// A fiber: one stack, and a switch to another one without the kernel's help. On x86-64 the switch is a dozen
// instructions (5-10 ns); elsewhere, or with DLKERN_UCONTEXT, it is ucontext's (200 ns, two system calls).
#pragma once
#include <cstddef>
#if !defined(__x86_64__) && !defined(DLKERN_UCONTEXT)
#define DLKERN_UCONTEXT
#endif
#ifdef DLKERN_UCONTEXT
#include <ucontext.h>
#endif

namespace cuda_on_host {

inline constexpr size_t kStackBytes = 64 * 1024;

struct Fiber {
  char* stack = nullptr;  // lowest address; null for the launching thread's own stack
  const void* sanitizer_bottom = nullptr;
  size_t sanitizer_bytes = 0;
  void* sanitizer_state = nullptr;
#ifdef DLKERN_UCONTEXT
  ucontext_t context;
#else
  void* stack_pointer = nullptr;
#endif
};

// A stack, mapped once and used again by later fibers; give it back with release_stack.
char* take_stack();
void release_stack(char* stack);

// Makes `fiber`, which has a stack, start at entry() when it is first switched to. Stack tops are staggered by
// `stagger`: 64 KB-aligned ones would all fall into the same cache sets.
void prepare_fiber(Fiber& fiber, void (*entry)(), unsigned stagger);

// Saves the caller in `from` and continues `to`; returns when somebody switches back. `last`: `from` never runs again.
void switch_fiber(Fiber& from, Fiber& to, bool last = false);

// To be called first thing by an entry function.
void fiber_started(Fiber& launcher);

}  // namespace cuda_on_host
