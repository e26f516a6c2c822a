// mbarriers. What a thread did before it arrived is ordered before what others do after they waited for that phase; so
// is, for what it copied, the copy engine (tensor_copy.cpp). A wait for the wrong phase returns early, as it does on
// the GPU, and what is then read is NaN; a phase that never completes is a deadlock. And barriers of some of a block's
// threads (bar.sync and bar.arrive with a number), which order in the same way.
#include "checker.h"
#include "machine.h"

namespace cuda_on_host {

void learn(Known& into, size_t slot, uint32_t time) {
  if (into.size() <= slot) into.resize(slot + 1);
  if (into[slot] < time) into[slot] = time;
}

bool any_known(const Block& block) {
  return !block.mbarriers.empty() || !block.warpgroups.empty() || !block.barriers.empty();
}

// What a thread that arrives knows, what its warp's last __syncwarp told it, and its own accesses so far.
static void tell(Known& arriving) {
  Thread& thread = *machine.current;
  join(arriving, thread.known);
  const size_t warp = thread.warp - thread.block->warps.data();
  for (size_t lane = 0; lane < 32; lane++) learn(arriving, warp * 32 + lane, thread.warp->synced_at);
  learn(arriving, warp * 32 + thread.lane, ++machine.clock);
}

Mbarrier* find_mbarrier(const uint64_t* barrier, const char* what) {
  Block& block = *machine.current->block;
  for (Mbarrier& known : block.mbarriers) {
    if (known.address != barrier) continue;
    check_shared_read(*machine.current, barrier, sizeof *barrier);  // ordered after its init
    return &known;
  }
  report("%s: no mbarrier there was initialised", what);
  return nullptr;
}

void settle(Mbarrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  barrier.phase++;
  barrier.pending = barrier.count;
  barrier.completed = barrier.arriving;
  for (Thread* thread : barrier.waiting) make_ready(thread);
  barrier.waiting.clear();
}

void mbarrier_init(uint64_t* barrier, unsigned count) {
  Thread& thread = *machine.current;
  Block& block = *thread.block;
  if (reinterpret_cast<uintptr_t>(barrier) % 8 || count == 0) return report("mbarrier.init: a wrong address or count");
  check_write(thread, barrier, sizeof *barrier);
  for (const Mbarrier& other : block.mbarriers) {
    if (other.address == barrier) return report("mbarrier.init: the mbarrier is initialised twice");
  }
  if (block.mbarriers.size() >= 24 * block.warps.size()) return report("mbarrier.init: too many for this tool");
  Mbarrier& made = block.mbarriers.emplace_back();
  made.address = barrier, made.count = made.pending = count;
}

void mbarrier_init_fence() {
  for (Mbarrier& barrier : machine.current->block->mbarriers) barrier.fenced = true;
}

static void arrive(Mbarrier& barrier) {
  if (barrier.pending == 0) return report("mbarrier: more arrivals in a phase than it was initialised with");
  tell(barrier.arriving);
  barrier.pending--;
  settle(barrier);
}

void mbarrier_arrive(uint64_t* barrier) {
  if (Mbarrier* found = find_mbarrier(barrier, "mbarrier.arrive")) arrive(*found);
}

void mbarrier_arrive_expect(uint64_t* barrier, unsigned bytes) {
  Mbarrier* found = find_mbarrier(barrier, "mbarrier.arrive.expect_tx");
  if (!found) return;
  found->bytes += bytes;
  arrive(*found);
}

void mbarrier_wait(uint64_t* barrier, unsigned parity) {
  Mbarrier* found = find_mbarrier(barrier, "mbarrier.try_wait");
  if (!found) return;
  Thread& thread = *machine.current;
  while (found->phase % 2 == parity % 2) {
    if (!found->copies.empty()) {
      run_copy(*found, 0);
    } else {
      found->waiting.push_back(&thread);
      sleep("mbarrier.try_wait");
    }
  }
  found->waited = found->phase;
  join(thread.known, found->completed);
}

void named_barrier(int number, unsigned threads, bool waits) {
  Thread& thread = *machine.current;
  Block& block = *thread.block;
  if (number < 1 || number > 15 || threads % 32 || threads > block.threads.size())
    return report("bar: a wrong number, or a wrong number of threads");
  if (block.barriers.empty()) block.barriers.resize(16);
  NamedBarrier& barrier = block.barriers[static_cast<size_t>(number)];
  if (barrier.arrived == 0) barrier.threads = threads;
  if (barrier.threads != threads) report("bar: threads meet that expect different numbers of them");
  tell(barrier.arriving);
  if (++barrier.arrived < barrier.threads) {
    if (!waits) return;
    barrier.waiting.push_back(&thread);
    return sleep("bar.sync");
  }
  if (waits) join(thread.known, barrier.arriving);
  for (Thread* waiting : barrier.waiting) join(waiting->known, barrier.arriving), make_ready(waiting);
  barrier = NamedBarrier{};
}

void fence_proxy_async() { machine.current->proxy_fences.push_back(machine.clock++); }

uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - machine.current->block->memory);
}

}  // namespace cuda_on_host
