// Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), the counter-based
// generator of every random op. The contract that makes all columns drop the same elements:
// element i of a tensor, counted in memory order, uses word (i / 1024) % 4 of the block whose counter is
// (i / 4096) * 1024 + i % 1024 and whose key is the 64-bit seed. So 1,024 consecutive counters give four
// consecutive runs of 1,024 elements and nothing has to be interleaved.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define DLKERN_HOST_DEVICE __host__ __device__ inline
#else
#define DLKERN_HOST_DEVICE inline
#endif

namespace dlkern::philox {

constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;
constexpr int kRounds = 10;
constexpr int64_t kRun = 1024, kGroup = 4096;

struct Block {
  uint32_t word[4];
};

DLKERN_HOST_DEVICE Block block(uint64_t seed, uint64_t counter) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kRounds; ++round) {
    uint64_t p0 = static_cast<uint64_t>(kMultiplier0) * c0, p1 = static_cast<uint64_t>(kMultiplier1) * c2;
    uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0, n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    c0 = n0;
    c2 = n2;
    k0 += kWeyl0;
    k1 += kWeyl1;
  }
  return Block{{c0, c1, c2, c3}};
}

// An element is kept where its word is at least this (keep probability 1 - p).
DLKERN_HOST_DEVICE uint64_t threshold(double p) { return static_cast<uint64_t>(p * 4294967296.0); }

}  // namespace dlkern::philox
