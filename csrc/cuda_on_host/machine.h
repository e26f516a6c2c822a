// The state of a running launch: CUDA threads, warps and blocks, and the clock that orders their accesses.
#pragma once
#include <cstdint>
#include <vector>

#include "cuda_on_host.h"
#include "fiber.h"

namespace cuda_on_host {

struct Block;
struct Shadow;
struct Warp;

// A 16-byte asynchronous copy that was issued and not yet waited for.
struct AsyncCopy {
  void* destination;
  const void* source;
  int bytes, source_bytes;  // the rest of the bytes becomes zero
  int group;
};

struct Thread {
  Fiber fiber;
  uint3 index;
  int lane;
  uint32_t id;  // unique in the launch: see checker.h
  Warp* warp;
  Block* block;
  bool done;
  const char* waits_at;  // source line, for the report of a deadlock
  std::vector<AsyncCopy> copies;
  int copy_group;
};

// What a lane brought to a warp collective: an operation over the arguments of all lanes of the mask.
struct Arrival {
  unsigned mask;
  void* argument;
  const char* where;
};

struct Warp {
  Thread* lanes[32];
  unsigned alive, arrived;  // a bit a lane
  Arrival arrivals[32];
  uint32_t synced_at;  // the clock at the last __syncwarp of all lanes
};

struct SharedArray {
  const void* tag;  // null for dynamic shared memory
  size_t offset, bytes;
};

struct Block {
  uint3 index;
  uint32_t linear_index;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  int alive;
  std::vector<Thread*> at_barrier;
  const char* barrier_where;
  uint32_t synced_at;               // the clock at the last __syncthreads
  // By block: accesses of it before that time are ordered before this block's, through counters. `acquired` is what a
  // thread read and a __syncthreads will make known to the others.
  std::vector<uint32_t> seen, acquired;
  unsigned char* memory = nullptr;  // shared memory and its red zones
  size_t memory_used;
  std::vector<SharedArray> arrays;
  Shadow* shadow = nullptr;  // of memory, in the checked build
};

enum class Order { forward, reverse, random };

struct Settings {
  Order order = Order::forward;
  unsigned seed = 1;
  int multiprocessors = 132;
};

struct Machine {
  const char* kernel = "";
  Thread* current = nullptr;  // null outside a launch
  std::vector<Block*> blocks;  // those running now: one, or all of a cooperative launch
  uint32_t clock = 1;  // counts synchronisations of any kind; see checker.h
  uint32_t grid_synced_at = 1;
};

extern Settings settings;
extern Machine machine;

inline constexpr unsigned char kPoison = 0xff;  // NaN in float and bfloat16
inline constexpr size_t kSharedLimit = 227 * 1024;  // of a block on sm_90

// scheduler.cpp: puts the current thread to sleep at `where`; make_ready lets one run again.
void sleep(const char* where);
void make_ready(Thread* thread);
bool continues_after_sync();  // whether the thread that completes a barrier runs on, or queues like the others

// counters.cpp
void forget_counters();  // a launch begins
void join(std::vector<uint32_t>& into, const std::vector<uint32_t>& from);  // the later of both, by block

// shared_memory.cpp
void shared_begin(Block& block, size_t dynamic_bytes);
void shared_end(Block& block);  // looks at the red zones

// control.cpp: notes a finding: "kernel: message [block 0,0,0 thread 5,0,0]".
void report(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace cuda_on_host
