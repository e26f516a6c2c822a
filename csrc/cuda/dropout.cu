// dropout, of elements and of channels: zero with probability p, scale the rest by 1 / (1 - p). The
// seed decides the mask (philox.h), so nothing is stored and the same op is its own backward.
// One Philox block serves four elements 1,024 apart, so a thread takes VEC neighbours in each of the four runs of a
// group: every access is 16 bytes wide and no random word is thrown away. Floor: one read and one write of the tensor.
#include "dropout.h"

#include "../philox.h"
#include "pack.cuh"

namespace dlkern::cuda {
namespace {

constexpr int kThreads = 256;

struct Rule {
  uint32_t threshold;
  float scale;
  const int64_t* seed;

  Rule(double p, const int64_t* device_seed)
      : threshold(static_cast<uint32_t>(philox::threshold(p))),
        scale(static_cast<float>(1.0 / (1.0 - p))),
        seed(device_seed) {}
};

template <class T>
DLKERN_DEVICE T dropped(T value, uint32_t word, const Rule& rule) {
  return from_float<T>(word >= rule.threshold ? to_float(value) * rule.scale : 0.0f);
}

template <class T, int VEC>
__global__ void __launch_bounds__(kThreads) dropout_kernel(const T* input, T* output, int64_t count, Rule rule) {
  constexpr int kThreadsARun = static_cast<int>(philox::kRun) / VEC;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t group = thread / kThreadsARun, in_run = thread % kThreadsARun * VEC;
  const int64_t first = group * philox::kGroup + in_run;
  if (first >= count) return;
  const auto seed = static_cast<uint64_t>(*rule.seed);
  uint32_t words[VEC][4];
#pragma unroll
  for (int v = 0; v < VEC; v++) {
    const philox::Block block = philox::block(seed, static_cast<uint64_t>(group * philox::kRun + in_run + v));
#pragma unroll
    for (int run = 0; run < 4; run++) words[v][run] = block.word[run];
  }
#pragma unroll
  for (int run = 0; run < 4; run++) {
    const int64_t at = first + run * philox::kRun;
    if (at + VEC <= count) {
      auto pack = load_pack<T, VEC>(input + at);
#pragma unroll
      for (int v = 0; v < VEC; v++) pack.at[v] = dropped(pack.at[v], words[v][run], rule);
      store_pack(output + at, pack);
    } else {
#pragma unroll
      for (int v = 0; v < VEC; v++) {
        if (at + v < count) output[at + v] = dropped(input[at + v], words[v][run], rule);
      }
    }
  }
}

// A thread an element, which looks up its channel's word.
template <class T>
__global__ void __launch_bounds__(kThreads) feature_dropout_kernel(const T* input, T* output, int64_t count, int64_t c,
                                                                   int64_t inner, bool channels_last, Rule rule) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const int64_t feature = channels_last ? i / (c * inner) * c + i % c : i / inner;
  const int64_t counter = feature / philox::kGroup * philox::kRun + feature % philox::kRun;
  const auto block = philox::block(static_cast<uint64_t>(*rule.seed), static_cast<uint64_t>(counter));
  const int run = static_cast<int>(feature / philox::kRun % 4);
  const uint32_t word = run == 0   ? block.word[0]
                        : run == 1 ? block.word[1]
                        : run == 2 ? block.word[2]
                                   : block.word[3];  // no index, which would put the words into local memory
  output[i] = dropped(input[i], word, rule);
}

dim3 blocks(int64_t threads) { return grid_of(ceil_div(threads, kThreads)); }

}  // namespace

void dropout(Element element, const void* input, void* output, int64_t count, double p, const int64_t* seed,
             void* stream) {
  with_type(element, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int VEC = 16 / sizeof(T);
    const int64_t threads = ceil_div(count, philox::kGroup) * (philox::kRun / VEC);
    DLKERN_LAUNCH((dropout_kernel<T, VEC>), blocks(threads), dim3(kThreads), 0, stream, static_cast<const T*>(input),
                  static_cast<T*>(output), count, Rule(p, seed));
  });
}

void feature_dropout(Element element, const void* input, void* output, int64_t n, int64_t c, int64_t inner,
                     bool channels_last, double p, const int64_t* seed, void* stream) {
  const int64_t count = n * c * inner;
  with_type(element, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    DLKERN_LAUNCH(feature_dropout_kernel<T>, blocks(count), dim3(kThreads), 0, stream, static_cast<const T*>(input),
                  static_cast<T*>(output), count, c, inner, channels_last, Rule(p, seed));
  });
}

}  // namespace dlkern::cuda
