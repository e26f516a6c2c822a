// Warp collectives: each lane of the mask brings an argument and sleeps; the last to arrive runs the operation over all
// of them, with the lane layouts of the PTX manual, and wakes the others.
#include <algorithm>

#include "checker.h"
#include "machine.h"

namespace cuda_on_host {

namespace {

constexpr unsigned kAllLanes = 0xffffffffu;

// `operation` gets the arguments by lane, null for lanes outside the mask.
template <class Operation>
void collective(unsigned mask, void* argument, const char* where, Operation&& operation) {
  Thread& thread = *machine.current;
  Warp& warp = *thread.warp;
  const unsigned self = 1u << thread.lane;
  if (!(mask & self)) report("%s: a lane outside the mask", where), mask |= self;
  if (mask & ~warp.alive)
    report("%s: the mask names lanes that do not exist or have returned", where), mask &= warp.alive;
  warp.arrivals[thread.lane] = {mask, argument, where};
  warp.arrived |= self;
  if ((warp.arrived & mask) != mask) return sleep(where);

  void* arguments[32] = {};
  for (int lane = 0; lane < 32; lane++) {
    if (!(mask >> lane & 1)) continue;
    const Arrival& arrival = warp.arrivals[lane];
    if (arrival.mask != mask || (arrival.where != where && std::strcmp(arrival.where, where) != 0))
      report("lanes of one warp meet in different operations: %s and %s", arrival.where, where);
    arguments[lane] = arrival.argument;
  }
  operation(arguments);
  warp.arrived &= ~mask;
  const bool run_on = continues_after_sync();
  for (int lane = 0; lane < 32; lane++) {
    if ((mask >> lane & 1) && !(run_on && lane == thread.lane)) make_ready(warp.lanes[lane]);
  }
  if (!run_on) sleep(where);
}

bool all_there(void** arguments) { return std::find(arguments, arguments + 32, nullptr) == arguments + 32; }

// The low element of a pair, float16 or bfloat16.
float low_of(uint32_t pair, bool half) {
  const auto bits = static_cast<uint16_t>(pair);
  return half ? __half2float({bits}) : __bfloat162float({bits});
}
float high_of(uint32_t pair, bool half) { return low_of(pair >> 16, half); }

}  // namespace

void shuffle(unsigned mask, void* value, size_t bytes, int source_lane, const char* where) {
  struct Argument {
    void* value;
    int source_lane;
    unsigned char result[16];
  } argument{value, source_lane, {}};
  collective(mask, &argument, where, [bytes](void** arguments) {
    for (int lane = 0; lane < 32; lane++) {
      auto* mine = static_cast<Argument*>(arguments[lane]);
      if (!mine) continue;
      auto* source = static_cast<Argument*>(arguments[mine->source_lane]);
      if (!source) report("a shuffle reads a lane outside the mask"), source = mine;
      std::memcpy(mine->result, source->value, bytes);
    }
  });
  std::memcpy(value, argument.result, bytes);
}

unsigned ballot(unsigned mask, bool vote, const char* where) {
  struct Argument {
    bool vote;
    unsigned result;
  } argument{vote, 0};
  collective(mask, &argument, where, [](void** arguments) {
    unsigned votes = 0;
    for (int lane = 0; lane < 32; lane++) {
      if (arguments[lane] && static_cast<Argument*>(arguments[lane])->vote) votes |= 1u << lane;
    }
    for (int lane = 0; lane < 32; lane++) {
      if (arguments[lane]) static_cast<Argument*>(arguments[lane])->result = votes;
    }
  });
  return argument.result;
}

void warp_barrier(unsigned mask, const char* where) {
  Warp& warp = *machine.current->warp;
  char nothing;
  collective(mask & warp.alive, &nothing, where, [&](void**) {
    if ((mask & warp.alive) == warp.alive) warp.synced_at = ++machine.clock;
    Known together;
    for (int lane = 0; lane < 32; lane++) {
      if (mask & warp.alive & 1u << lane) join(together, warp.lanes[lane]->known);
    }
    if (together.empty()) return;
    for (int lane = 0; lane < 32; lane++) {
      if (mask & warp.alive & 1u << lane) warp.lanes[lane]->known = together;
    }
  });
}

// Four 8x8 matrices of 16-bit elements. Lane 8m + r gives the address of row r of matrix m; lane i receives elements
// 2(i % 4) and 2(i % 4) + 1 of row i / 4 of each, of the transposed matrix in the other form.
void ldmatrix_x4(uint32_t (&fragment)[4], const void* row, bool transposed) {
  struct Argument {
    const void* row;
    uint32_t* fragment;
  } argument{row, fragment};
  collective(kAllLanes, &argument, transposed ? "ldmatrix.trans" : "ldmatrix", [transposed](void** arguments) {
    if (!all_there(arguments)) return;
    for (int matrix = 0; matrix < 4; matrix++) {
      uint16_t element[8][8];
      for (int r = 0; r < 8; r++) {
        const int lane = 8 * matrix + r;
        const void* address = static_cast<Argument*>(arguments[lane])->row;
        if (reinterpret_cast<uintptr_t>(address) % 16) report("ldmatrix: a row's address is not a multiple of 16");
        check_shared_read(*machine.current->warp->lanes[lane], address, 16);
        std::memcpy(element[r], address, 16);
      }
      for (int lane = 0; lane < 32; lane++) {
        const int r = lane / 4, c = 2 * (lane % 4);
        const uint16_t first = transposed ? element[c][r] : element[r][c];
        const uint16_t second = transposed ? element[c + 1][r] : element[r][c + 1];
        static_cast<Argument*>(arguments[lane])->fragment[matrix] = first | static_cast<uint32_t>(second) << 16;
      }
    }
  });
}

// mma.sync of A[16][DEPTH] and B[DEPTH][8], of every element type: unpack(word, t, second, set) calls set(k, value) for
// the elements in a word of A or B of a lane, t its number modulo 4, `second` for those in the second half of k.
namespace {

template <int DEPTH, class Unpack>
void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const char* where, Unpack&& unpack) {
  struct Argument {
    float* c;
    const uint32_t* a;
    uint32_t b[2];
  } argument{c, a, {b0, b1}};
  collective(kAllLanes, &argument, where, [&unpack](void** arguments) {
    if (!all_there(arguments)) return;
    float A[16][DEPTH], B[DEPTH][8], C[16][8];
    const auto for_each_c = [&](auto&& f) {
      for (int lane = 0; lane < 32; lane++) {
        float* const mine = static_cast<Argument*>(arguments[lane])->c;
        for (int i = 0; i < 4; i++) f(C[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2], mine[i]);
      }
    };
    for (int lane = 0; lane < 32; lane++) {
      const auto& mine = *static_cast<Argument*>(arguments[lane]);
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; i++) unpack(mine.a[i], t, i / 2, [&](int k, float value) { A[g + i % 2 * 8][k] = value; });
      for (int i = 0; i < 2; i++) unpack(mine.b[i], t, i, [&](int k, float value) { B[k][g] = value; });
    }
    for_each_c([](float& sum, float& mine) { sum = mine; });
    for (int i = 0; i < 16; i++) {
      for (int k = 0; k < DEPTH; k++) {
        for (int j = 0; j < 8; j++) C[i][j] += A[i][k] * B[k][j];
      }
    }
    for_each_c([](float& sum, float& mine) { mine = sum; });
  });
}

}  // namespace

// C[16][8] += A[16][16] B[16][8] in float. With g = lane / 4 and t = lane % 4, a lane holds of A rows g and g + 8,
// columns 2t, 2t + 1 (then + 8); of B column g, rows 2t, 2t + 1 (then + 8); of C rows g and g + 8, columns 2t, 2t + 1.
void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool half) {
  multiply<16>(c, a, b0, b1, half ? "mma.sync.f16" : "mma.sync.bf16",
               [half](uint32_t pair, int t, int second, auto&& set) {
                 set(2 * t + 8 * second, low_of(pair, half));
                 set(2 * t + 8 * second + 1, high_of(pair, half));
               });
}

// The same with a depth of 8: a lane holds one element a word, t (then t + 4), and its last 13 bits do not count.
void mma_tf32_16x8x8(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply<8>(c, a, b0, b1, "mma.sync.tf32", [](uint32_t word, int t, int second, auto&& set) {
    word &= ~0x1fffu;
    float value;
    std::memcpy(&value, &word, 4);
    set(t + 4 * second, value);
  });
}

uint32_t to_tf32(float value) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  return value == value ? (word + 0x1000u) & ~0x1fffu : 0x7fffffffu;
}

}  // namespace cuda_on_host
