// cp.async: the destination is NaN from the issue until the thread waits for the copy's group; only then the source is
// read. A wait that lets one group too many pass therefore leaves NaN, and the checker sees bytes nobody wrote.
#include "checker.h"
#include "machine.h"

namespace cuda_on_host {

void cp_async(void* destination, const void* source, int bytes, int source_bytes) {
  Thread& thread = *machine.current;
  const auto misaligned = [bytes](const void* p) { return reinterpret_cast<uintptr_t>(p) % bytes != 0; };
  if (misaligned(destination) || misaligned(source)) return report("cp.async at a misaligned address");
  check_read(thread, source, source_bytes);
  check_issue(thread, destination, bytes);
  std::memset(destination, kPoison, bytes);
  thread.copies.push_back({destination, source, bytes, source_bytes, thread.copy_group});
}

void cp_async_commit() { machine.current->copy_group++; }

void cp_async_wait(int groups_left) {
  Thread& thread = *machine.current;
  size_t kept = 0;
  for (const AsyncCopy& copy : thread.copies) {
    if (copy.group >= thread.copy_group - groups_left) {
      thread.copies[kept++] = copy;
      continue;
    }
    check_write(thread, copy.destination, copy.bytes);
    if (copy.source_bytes) std::memcpy(copy.destination, copy.source, copy.source_bytes);
    std::memset(static_cast<char*>(copy.destination) + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
  }
  thread.copies.resize(kept);
}

}  // namespace cuda_on_host
