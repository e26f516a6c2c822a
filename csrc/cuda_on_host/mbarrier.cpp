// mbarriers. What a thread did before it arrived is ordered before what others do after they waited for that phase; so
// is, for what it copied, the copy engine (tensor_copy.cpp). A wait for the wrong phase returns early, as it does on
// the GPU, and what is then read is NaN; a phase that never completes is a deadlock.
#include "checker.h"
#include "machine.h"

namespace cuda_on_host {

void learn(Known& into, size_t slot, uint32_t time) {
  if (into.size() <= slot) into.resize(slot + 1);
  if (into[slot] < time) into[slot] = time;
}

bool any_known(const Block& block) { return !block.mbarriers.empty() || !block.warpgroups.empty(); }

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
  Thread& thread = *machine.current;
  if (barrier.pending == 0) return report("mbarrier: more arrivals in a phase than it was initialised with");
  // What the thread knows, what its warp's last __syncwarp told it, and its own accesses so far.
  join(barrier.arriving, thread.known);
  const size_t warp = thread.warp - thread.block->warps.data();
  for (size_t lane = 0; lane < 32; lane++) learn(barrier.arriving, warp * 32 + lane, thread.warp->synced_at);
  learn(barrier.arriving, warp * 32 + thread.lane, ++machine.clock);
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

void fence_proxy_async() { machine.current->proxy_fences.push_back(machine.clock++); }

uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - machine.current->block->memory);
}

}  // namespace cuda_on_host
