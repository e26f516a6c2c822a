// Division of a 31-bit number by a divisor known at launch: one multiplication and a shift instead of the ~20
// instructions of an integer division (Granlund and Montgomery 1994). And slices of tensors with more items than that.
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
    DLKERN_EXPECT(n <= most_numbers());
    const uint32_t quotient = (__umulhi(n, multiplier) + n) >> shift;
    remainder = n - quotient * divisor;
    return quotient;
  }
};

// Calls f(first, count) for slices of `outer`, each member of which has `inner` items, so that a launch can number those
// of a slice; throws where one member alone has too many. Both are more than none.
template <class F>
void for_slices(const char* op, int64_t outer, int64_t inner, F&& f) {
  const int64_t most = most_numbers() / inner;
  if (most == 0)
    throw std::runtime_error(std::string(op) + ": more than 2^31 - 1 elements of one image or sequence (cuda column)");
  for (int64_t first = 0; first < outer; first += most) f(first, outer - first < most ? outer - first : most);
}

}  // namespace dlkern::cuda
