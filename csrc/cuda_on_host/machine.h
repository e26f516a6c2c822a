// The state of a running launch: CUDA threads, warps and blocks, and the clock that orders their accesses.
#pragma once
#include <array>
#include <cstdint>
#include <deque>
#include <vector>

#include "cuda_on_host.h"
#include "fiber.h"

namespace cuda_on_host {

struct Block;
struct Shadow;
struct Sum;
struct Thread;
struct Warp;

// A 16-byte asynchronous copy that was issued and not yet waited for.
struct AsyncCopy {
  void* destination;
  const void* source;
  int bytes, source_bytes;  // the rest of the bytes becomes zero
  int group;
};

// Per slot (a thread, or one of the engines below): its accesses before that time are ordered before the owner's.
using Known = std::vector<uint32_t>;

struct TensorCopy {
  unsigned char* destination;
  TensorMap map;
  int at[4], offset[2];
};

struct Mbarrier {
  const uint64_t* address;
  unsigned count, pending;  // arrivals of a phase, and those still missing
  int64_t bytes = 0;        // still to be copied in this phase
  unsigned phase = 0;
  unsigned copied = 0, waited = 0;  // phases: the latest one with a copy, the latest one waited for, counted from 1
  bool fenced = false;
  Known arriving, completed;  // what those who arrived know, in this phase and up to the last completed one
  std::vector<TensorCopy> copies;  // issued, not yet done
  std::vector<Thread*> waiting;
};

// bar.sync and bar.arrive of some of a block's threads.
struct NamedBarrier {
  unsigned threads = 0, arrived = 0;
  Known arriving;
  std::vector<Thread*> waiting;
};

// A wgmma instruction of a warpgroup; it runs when somebody waits for it and all 128 threads have issued it.
struct MatrixProduct {
  uint64_t a, b;
  int n;
  bool a_transposed, b_transposed, adds, half, a_in_registers;
  int issued = 0;
  uint32_t time = 0;  // when the last thread issued it
  Sum* sum = nullptr;
  // Where A is in registers, those of each thread: what they hold, and where they are.
  std::vector<std::array<uint32_t, 4>> a_values = {};
  std::vector<const uint32_t*> a_registers = {};
};

// The accumulators that a chain of products adds to, while they belong to the tensor cores.
struct Sum {
  float value[64 * 256];
  float* registers[128] = {};  // of each thread; null before its first product of the chain
  int last[128] = {};          // the thread's latest product of the chain, counted from 1
  int columns = 0;
  int retired = 0;             // threads that have the result back
};

struct Warpgroup {
  std::deque<MatrixProduct> products;
  size_t done = 0;
  std::deque<Sum> sums;
  std::vector<Thread*> waiting;
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
  Known known;  // through mbarriers, beyond what the block's and the warp's synchronisations order
  std::vector<uint32_t> proxy_fences;  // times of fence.proxy.async
  int products, products_waited;  // wgmma: issued, and known to be done
  std::vector<int> product_groups;  // products issued before each commit
  std::vector<Sum*> sums;           // accumulators that are the tensor cores' now
  bool wgmma_fenced;
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
  std::deque<Mbarrier> mbarriers;
  std::vector<NamedBarrier> barriers;  // by number; empty before the first use
  std::vector<Warpgroup> warpgroups;
  Known known;  // of all threads, since the last __syncthreads
  // Latest read of each 16 bytes by each warpgroup's wgmma, in the checked build.
  uint32_t (*operand_reads)[8] = nullptr;

  // Slots of Known: threads, then warpgroups (as wgmma's readers), then mbarriers (as writers of their copies).
  size_t warpgroup_slot(size_t group) const { return warps.size() * 32 + group; }
  size_t mbarrier_slot(size_t barrier) const { return warps.size() * 32 + 8 + barrier; }
};

enum class Order { forward, reverse, random };

struct Settings {
  Order order = Order::forward;
  unsigned seed = 1;
  int multiprocessors = 132;
  bool hopper = false;  // whether launchers may choose kernels of sm_90a
  bool looks_at_indices = true;
  int64_t most_numbers = INT32_MAX;  // that a launch's items may have
  size_t shared_bytes = 227 * 1024;  // that a block may have: those of sm_90
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

// mbarrier.cpp
bool any_known(const Block& block);
void learn(Known& into, size_t slot, uint32_t time);
bool early();  // whether an asynchronous copy runs at once; otherwise it runs when somebody waits for it
Mbarrier* find_mbarrier(const uint64_t* barrier, const char* what);
void settle(Mbarrier& barrier);  // completes the phase where nothing is missing

// tensor_copy.cpp
void run_copy(Mbarrier& barrier, size_t which);

}  // namespace cuda_on_host
