// Division of a 31-bit number by a divisor known at launch: one multiplication and a shift instead of the ~20
// instructions of an integer division (Granlund and Montgomery 1994).
#pragma once
#include "platform.cuh"

namespace dlkern::cuda {

struct FastDivide {
  uint32_t divisor = 1, multiplier = 0, shift = 0;

  FastDivide() = default;  // by 1
  // For 1 <= divisor < 2**31.
  explicit FastDivide(int64_t d) : divisor(static_cast<uint32_t>(d)) {
    while ((uint64_t{1} << shift) < divisor) shift++;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - divisor)) / divisor + 1);
  }

  // n < 2**31; `remainder` receives n % divisor.
  DLKERN_DEVICE uint32_t divide(uint32_t n, uint32_t& remainder) const {
    const uint32_t quotient = (__umulhi(n, multiplier) + n) >> shift;
    remainder = n - quotient * divisor;
    return quotient;
  }
};

}  // namespace dlkern::cuda
