#pragma once
#include <cstdint>

#include "isa.h"

namespace dlkern::cpu {
// Runs `rounds` rounds of independent fused multiply-adds on every thread (kPeakThreads at most), in float32, or in
// float64 where `wide`. Returns the floating-point operations done; sums[thread] gets a value that depends on them.
constexpr int kPeakThreads = 1024;
DLKERN_DECLARE(int64_t, peak_fma, int64_t rounds, bool wide, double* sums)
}  // namespace dlkern::cpu
