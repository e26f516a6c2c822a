#include "parallel.h"

#include <sched.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

namespace dlkern::cpu {

int num_threads() { return static_cast<int>(torch::stable::get_num_threads()); }

void parallel_for(int64_t n, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

void give_way() { sched_yield(); }

}  // namespace dlkern::cpu
