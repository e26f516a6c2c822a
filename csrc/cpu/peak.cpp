// peak: the floating-point rate this CPU reaches in the instruction set we run, for the floors of the benchmark.
// Each thread keeps enough independent accumulators in registers to hide the latency of a fused multiply-add; nothing
// touches memory. Not a kernel of any network.
#include "peak.h"

#include "parallel.h"
#include "simd.h"

#if defined(DLKERN_VECTOR_BYTES)
#define DLKERN_VECTOR_REGISTER "m"  // a vector of the wide test build does not fit a register
#elif defined(__x86_64__)
#define DLKERN_VECTOR_REGISTER "v"
#else
#define DLKERN_VECTOR_REGISTER "w"
#endif

namespace dlkern::cpu::DLKERN_ISA {
namespace {

// Latency 4 to 5 cycles, two a cycle: ten chains suffice, and they fit the 16 registers of AVX2.
constexpr int kChains = 12;

// Every loop over the chains is unrolled, or the compiler would keep them in memory.
template <class T> double chains(int64_t rounds) {
  Vec<T> sum[kChains];
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) sum[i] = broadcast<T>(static_cast<T>(i + 1));
  const Vec<T> a = broadcast<T>(static_cast<T>(0.999999)), b = broadcast<T>(static_cast<T>(1e-6));
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) {
      sum[i] = sum[i] * a + b;
      asm volatile("" : "+" DLKERN_VECTOR_REGISTER(sum[i]));  // keeps the chains apart and the loop in place
    }
  }
  double total = 0;
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) total += static_cast<double>(reduce_add(sum[i]));
  return total;
}

}  // namespace

int64_t peak_fma(int64_t rounds, bool wide, double* sums) {
  const int wanted = num_threads();
  const int threads = wanted < kPeakThreads ? wanted : kPeakThreads;
  parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread)
      sums[thread] = wide ? chains<double>(rounds) : chains<float>(rounds);
  });
  const int64_t lanes = wide ? kLanes<double> : kLanes<float>;
  return 2 * kChains * lanes * rounds * threads;
}

}  // namespace dlkern::cpu::DLKERN_ISA
