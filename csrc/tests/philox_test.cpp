// philox.h against the known answers of Random123 (kat_vectors, philox4x32-10), by way of a second implementation that
// takes all four words of the counter.
#include "philox.h"

#include "check.h"

using namespace dlkern::test;

struct Words {
  uint32_t w[4];
};

static Words philox4x32_10(Words counter, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const uint64_t left = uint64_t{0xD2511F53u} * counter.w[0], right = uint64_t{0xCD9E8D57u} * counter.w[2];
    counter = {{static_cast<uint32_t>(right >> 32) ^ counter.w[1] ^ k0, static_cast<uint32_t>(right),
                static_cast<uint32_t>(left >> 32) ^ counter.w[3] ^ k1, static_cast<uint32_t>(left)}};
  }
  return counter;
}

int main() {
  struct {
    Words counter;
    uint32_t key[2];
    Words answer;
  } const known[] = {
      {{{0, 0, 0, 0}}, {0, 0}, {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}}},
      {{{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}},
       {0xffffffff, 0xffffffff},
       {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}}},
      {{{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}},
       {0xa4093822, 0x299f31d0},
       {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}}},
  };
  for (const auto& k : known) {
    const Words got = philox4x32_10(k.counter, k.key[0], k.key[1]);
    for (int i = 0; i < 4; ++i) CHECK(got.w[i] == k.answer.w[i], "word %d: %08x", i, got.w[i]);
  }
  Random random;
  for (int i = 0; i < 1000; ++i) {
    const uint64_t seed = uint64_t{random.bits()} << 32 | random.bits();
    const uint64_t counter = i == 0 ? 0 : uint64_t{random.bits()} << (i % 33) | random.bits();
    const dlkern::philox::Block ours = dlkern::philox::block(seed, counter);
    const Words theirs = philox4x32_10({{static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0, 0}},
                                       static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
    for (int j = 0; j < 4; ++j) CHECK(ours.word[j] == theirs.w[j], "draw %d, word %d", i, j);
  }
  CHECK(dlkern::philox::threshold(0.0) == 0, "p = 0 keeps all");
  CHECK(dlkern::philox::threshold(0.5) == uint64_t{1} << 31, "p = 0.5");
  CHECK(dlkern::philox::threshold(1.0) == uint64_t{1} << 32, "p = 1 keeps none");
  return report("philox");
}
