// parallel.h and scratch.h: every index once, in pieces of at least the grain; buffers aligned, kept, apart.
#include "cpu/parallel.h"

#include <atomic>
#include <vector>

#include "check.h"
#include "cpu/scratch.h"

using namespace dlkern::cpu;
using namespace dlkern::test;

static void every_index_once() {
  for (int64_t n : {0, 1, 2, 7, 64, 1000, 10007})
    for (int64_t grain : {1, 3, 64, 5000, 20000}) {
      std::vector<std::atomic<int>> seen(static_cast<size_t>(n));
      std::atomic<int> calls{0};
      parallel_for(n, grain, [&](int64_t begin, int64_t end) {
        ++calls;
        CHECK(0 <= begin && begin < end && end <= n, "piece [%ld, %ld) of %ld", long(begin), long(end), long(n));
        for (int64_t i = begin; i < end; ++i) ++seen[static_cast<size_t>(i)];
      });
      for (int64_t i = 0; i < n; ++i) CHECK(seen[static_cast<size_t>(i)] == 1, "index %ld of %ld", long(i), long(n));
      CHECK(n > 0 || calls == 0, "nothing to do, yet called");
      CHECK(n > grain || calls <= 1, "%ld indices, grain %ld, %d pieces", long(n), long(grain), calls.load());
    }
}

static void nested_regions_stay_on_their_thread() {
  std::atomic<int> sum{0};
  parallel_for(8, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      parallel_for(10, 1, [&](int64_t b, int64_t e) { sum += static_cast<int>(e - b); });
  });
  CHECK(sum == 80, "%d", sum.load());
  CHECK(num_threads() >= 1, "%d threads", num_threads());
}

static void scratch_buffers() {
  char* a = scratch<char>(Slot::gemm_a, 100);
  char* b = scratch<char>(Slot::gemm_b, 100);
  CHECK(a != b, "two slots share memory");
  CHECK(reinterpret_cast<uintptr_t>(a) % 64 == 0 && reinterpret_cast<uintptr_t>(b) % 64 == 0, "alignment");
  CHECK(scratch<char>(Slot::gemm_a, 50) == a, "a smaller request gets the same buffer");
  char* grown = scratch<char>(Slot::gemm_a, int64_t{1} << 20);
  std::memset(grown, 1, size_t{1} << 20);
  std::memset(b, 2, 100);
  CHECK(grown[99] == 1, "the other slot was overwritten");
}

int main() {
  every_index_once();
  nested_regions_stay_on_their_thread();
  scratch_buffers();
  return report("parallel and scratch");
}
