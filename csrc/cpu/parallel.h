// Threads of the CPU column: torch's own pool and torch's own setting (torch.set_num_threads).
#pragma once
#include <cstdint>

namespace dlkern::cpu {

// Threads torch would use here; 1 inside a parallel region.
int num_threads();
// Lets another thread or process have the core.
void give_way();
// Between two looks at what another thread is to write.
inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}
// Multiply-adds for which another thread is worth waking.
constexpr double kWorthWaking = 262144;
// Runs body(context, begin, end) over a partition of [0, n) into pieces of at least `grain`.
// The body must not throw.
void parallel_for(int64_t n, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context);

template <class F>
inline void parallel_for(int64_t n, int64_t grain, F&& f) {
  if (n <= 0) return;
  if (n <= grain) {  // not worth waking the pool
    f(int64_t{0}, n);
    return;
  }
  parallel_for(
      n, grain, [](void* context, int64_t begin, int64_t end) { (*static_cast<F*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

// f(task) for each of [0, tasks) on `workers` threads, which take the next one when they are done: for tasks of different
// lengths, the longest first.
template <class F> inline void parallel_tasks(int64_t workers, int64_t tasks, F&& f) {
  int64_t next = 0;
  parallel_for(workers, 1, [&](int64_t, int64_t) {
    for (int64_t task; (task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < tasks;) f(task);
  });
}

}  // namespace dlkern::cpu
