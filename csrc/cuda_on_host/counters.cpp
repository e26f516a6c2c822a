// Counters in global memory through which blocks of a cooperative launch wait for each other: red.release adds, and who
// reads the sum by ld.acquire is ordered after all that added to it. Known of a block is what lies before its last
// __syncthreads; the reader's block knows it after its next one (the checked build takes anything finer for a race).
#include <map>

#include "checker.h"
#include "machine.h"

namespace cuda_on_host {

namespace {

std::map<const void*, std::vector<uint32_t>> released;  // by counter
std::vector<Thread*> spinning;

}  // namespace

void join(std::vector<uint32_t>& into, const std::vector<uint32_t>& from) {
  if (into.size() < from.size()) into.resize(from.size());
  for (size_t i = 0; i < from.size(); i++) {
    if (from[i] > into[i]) into[i] = from[i];
  }
}

void forget_counters() {
  released.clear();
  spinning.clear();
}

void red_release_add(unsigned* counter, unsigned value) {
  Block& block = *machine.current->block;
  check_atomic(*machine.current, counter, sizeof *counter);
  *counter += value;
  std::vector<uint32_t>& known = released[counter];
  join(known, block.seen);
  if (known.size() <= block.linear_index) known.resize(block.linear_index + 1);
  if (known[block.linear_index] < block.synced_at) known[block.linear_index] = block.synced_at;
  for (Thread* thread : spinning) make_ready(thread);
  spinning.clear();
}

unsigned ld_acquire(const unsigned* counter) {
  check_atomic(*machine.current, counter, sizeof *counter);
  join(machine.current->block->acquired, released[counter]);
  return *counter;
}

void spin(const char* where) {
  spinning.push_back(machine.current);
  sleep(where);
}

int64_t blocks_at_once(int64_t shared_bytes) {
  const auto limit = static_cast<int64_t>(settings.shared_bytes);
  return shared_bytes > limit ? -1 : settings.multiprocessors * (limit / (shared_bytes + 1024));
}

int most_shared_bytes() { return static_cast<int>(settings.shared_bytes); }
int multiprocessors() { return settings.multiprocessors; }
bool is_hopper() { return settings.hopper; }
int64_t most_numbers() { return settings.most_numbers; }

}  // namespace cuda_on_host
