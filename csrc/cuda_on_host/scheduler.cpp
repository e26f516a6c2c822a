// Launches: runs every thread of a grid as a fiber on the calling CPU thread, one at a time, block after block (all
// blocks together in a cooperative launch). A thread runs until it sleeps in a barrier; the order decides who is next.
#include <algorithm>
#include <deque>
#include <mutex>
#include <random>

#include "checker.h"
#include "machine.h"

namespace cuda_on_host {

ThisThread this_thread;
Settings settings;
Machine machine;
alignas(64) unsigned char parameters[kParameterBytes];

namespace {

Fiber launcher;
void (*kernel_body)(void*);
std::deque<Thread*> ready;
std::vector<Thread*> at_grid_barrier;
size_t alive;  // threads of the running blocks that have not returned
std::mt19937 random_source;
std::vector<Block*> spare_blocks;

Thread* next_thread() {
  if (ready.empty()) return nullptr;
  size_t i = 0;
  if (settings.order == Order::reverse) i = ready.size() - 1;
  if (settings.order == Order::random) i = random_source() % ready.size();
  std::swap(ready[i], i == 0 ? ready.front() : ready.back());
  Thread* thread = i == 0 ? ready.front() : ready.back();
  if (i == 0)
    ready.pop_front();
  else
    ready.pop_back();
  return thread;
}

// Continues `next`, or the launcher where nobody is ready: all have returned, or all sleep (a deadlock).
void run_next(Fiber& from, bool last) {
  Thread* next = next_thread();
  machine.current = next;
  if (next) {
    this_thread.thread_index = next->index;
    this_thread.block_index = next->block->index;
    this_thread.lane = next->lane;
  }
  Fiber& to = next ? next->fiber : launcher;
  if (&from != &to) switch_fiber(from, to, last);
}

void release_barrier(Block& block) {
  block.synced_at = ++machine.clock;
  join(block.seen, block.acquired);
  if (any_known(block)) {
    for (Thread& thread : block.threads) {
      join(block.known, thread.known);
      thread.known.clear();
    }
  }
  block.barrier_where = nullptr;
  for (Thread* thread : block.at_barrier) ready.push_back(thread);
  block.at_barrier.clear();
}

void thread_main() {
  fiber_started(launcher);
  kernel_body(parameters);
  Thread& thread = *machine.current;
  thread.done = true;
  if (!thread.copies.empty()) report("a thread returned with cp.async copies not waited for");
  if (thread.products_waited != thread.products) report("a thread returned with wgmma products not waited for");
  thread.warp->alive &= ~(1u << thread.lane);
  alive--;
  Block& block = *thread.block;
  if (block.alive == 1) {
    for (const Mbarrier& barrier : block.mbarriers) {
      if (barrier.copied > barrier.waited) report("a block ended with cp.async.bulk copies not waited for");
    }
    for (const NamedBarrier& barrier : block.barriers) {
      if (barrier.arrived != 0) report("a block ended with arrivals at a barrier that not all reached");
    }
  }
  // Threads that have returned count as arrived.
  if (--block.alive && static_cast<int>(block.at_barrier.size()) == block.alive) release_barrier(block);
  run_next(thread.fiber, true);
}

void start_block(Block& block, uint3 index, uint32_t linear_index, dim3 size, size_t shared_bytes) {
  const unsigned threads = size.x * size.y * size.z;
  const unsigned warps = (threads + 31) / 32;
  block.index = index;
  block.linear_index = linear_index;
  block.seen.clear();
  block.acquired.clear();
  block.threads.resize(threads);
  block.warps.assign(warps, Warp{});
  block.alive = static_cast<int>(threads);
  block.at_barrier.clear();
  block.barrier_where = nullptr;
  block.synced_at = ++machine.clock;
  block.mbarriers.clear();
  block.barriers.clear();
  block.warpgroups.clear();
  block.known.clear();
  shared_begin(block, shared_bytes);
  for (unsigned i = 0; i < threads; i++) {
    Thread& thread = block.threads[i];
    Warp& warp = block.warps[i / 32];
    thread.index = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
    thread.lane = static_cast<int>(i % 32);
    thread.id = thread_id(linear_index, warps, i);
    thread.warp = &warp;
    thread.block = &block;
    thread.done = false;
    thread.waits_at = "its start";
    thread.copies.clear();
    thread.copy_group = 0;
    thread.known.clear();
    thread.proxy_fences.clear();
    thread.products = thread.products_waited = 0;
    thread.product_groups.clear();
    thread.sums.clear();
    thread.wgmma_fenced = false;
    thread.fiber.stack = take_stack();
    prepare_fiber(thread.fiber, thread_main, i);
    warp.lanes[thread.lane] = &thread;
    warp.alive |= 1u << thread.lane;
    warp.synced_at = block.synced_at;
    ready.push_back(&thread);
  }
  alive += threads;
}

void report_deadlock() {
  for (Block* block : machine.blocks) {
    for (Thread& thread : block->threads) {
      if (thread.done) continue;
      report("deadlock: %zu threads wait for ever; thread %u,%u,%u of block %u,%u,%u at %s", alive, thread.index.x,
             thread.index.y, thread.index.z, block->index.x, block->index.y, block->index.z, thread.waits_at);
      return;
    }
  }
}

}  // namespace

void sleep(const char* where) {
  Thread& thread = *machine.current;
  thread.waits_at = where;
  run_next(thread.fiber, false);
}

void make_ready(Thread* thread) { ready.push_back(thread); }

bool early() { return settings.order == Order::reverse || (settings.order == Order::random && random_source() % 2); }

bool continues_after_sync() { return settings.order == Order::forward; }

void block_barrier(const char* where) {
  Thread* thread = machine.current;
  Block& block = *thread->block;
  if (!block.barrier_where)
    block.barrier_where = where;
  else if (std::strcmp(block.barrier_where, where) != 0)
    report("threads of one block wait in different barriers: %s and %s", block.barrier_where, where);
  if (static_cast<int>(block.at_barrier.size()) + 1 == block.alive) {
    release_barrier(block);
    if (continues_after_sync()) return;
    ready.push_back(thread);
  } else {
    block.at_barrier.push_back(thread);
  }
  sleep(where);
}

void grid_barrier(const char* where) {
  Thread* thread = machine.current;
  at_grid_barrier.push_back(thread);
  if (at_grid_barrier.size() == alive) {
    machine.grid_synced_at = ++machine.clock;
    for (Block* block : machine.blocks) block->synced_at = machine.clock;
    for (Thread* other : at_grid_barrier) ready.push_back(other);
    at_grid_barrier.clear();
  }
  sleep(where);
}

void yield(const char* where) {
  ready.push_back(machine.current);
  sleep(where);
}

void run_grid(const char* name, dim3 grid, dim3 block_size, size_t shared_bytes, bool cooperative,
              void (*body)(void*)) {
  machine.kernel = name;
  kernel_body = body;
  random_source.seed(settings.seed);
  this_thread.block_size = block_size;
  this_thread.grid_size = grid;
  machine.grid_synced_at = ++machine.clock;
  if (shared_bytes > settings.shared_bytes)
    return report("%zu bytes of shared memory; a block has %zu", shared_bytes, settings.shared_bytes);
  const uint64_t threads = uint64_t{block_size.x} * block_size.y * block_size.z;
  if (threads == 0 || threads > 1024) return report("%zu threads a block; at least 1, at most 1024", size_t{threads});
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535)
    return report("a grid of %u x %u x %u blocks; at least 1, at most 2^31 - 1, 65535 and 65535", grid.x, grid.y,
                  grid.z);

  const uint32_t count = grid.x * grid.y * grid.z;
  std::vector<uint32_t> order(count);
  for (uint32_t i = 0; i < count; i++) order[i] = settings.order == Order::reverse ? count - 1 - i : i;
  if (settings.order == Order::random) std::shuffle(order.begin(), order.end(), random_source);
  const uint32_t together = cooperative ? count : 1;

  for (uint32_t first = 0; first < count; first += together) {
    ready.clear();
    at_grid_barrier.clear();
    forget_counters();
    machine.blocks.clear();
    alive = 0;
    for (uint32_t i = first; i < first + together; i++) {
      if (spare_blocks.empty()) spare_blocks.push_back(new Block);
      Block* block = spare_blocks.back();
      spare_blocks.pop_back();
      machine.blocks.push_back(block);
      const uint32_t b = order[i];
      start_block(*block, {b % grid.x, b / grid.x % grid.y, b / (grid.x * grid.y)}, b, block_size, shared_bytes);
    }
    run_next(launcher, false);
    machine.current = nullptr;
    if (alive) report_deadlock();
    for (Block* block : machine.blocks) {
      shared_end(*block);
      for (Thread& thread : block->threads) release_stack(thread.fiber.stack);
      spare_blocks.push_back(block);
    }
  }
  machine.blocks.clear();
}

}  // namespace cuda_on_host
