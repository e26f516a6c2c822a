// Launchers of dropout.cu, in plain C++ for the op layer. Each throws std::runtime_error where its launch fails.
// `seed` is one int64 on the device; p is below 1. Fewer than 2**39 elements.
#pragma once
#include <cstdint>

#include "element.h"

namespace dlkern::cuda {

// Elements are counted in memory order.
void dropout(Element element, const void* input, void* output, int64_t count, double p, const int64_t* seed,
             void* stream);

// Channels [n, c] are dropped as the elements of a tensor [n, c] would be. [n, c, inner], or [n, inner, c] where
// channels are last.
void feature_dropout(Element element, const void* input, void* output, int64_t n, int64_t c, int64_t inner,
                     bool channels_last, double p, const int64_t* seed, void* stream);

}  // namespace dlkern::cuda
