// cp.async: the destination is NaN from the issue until the thread waits for the copy's group; only then the source is
// read. A wait that lets one group too many pass therefore leaves NaN, and the checker sees bytes nobody wrote.
#include "checker.h"
#include "machine.h"

namespace cuda_on_host {

void cp_async16(void* destination, const void* source, int source_bytes) {
  Thread& thread = *machine.current;
  const auto misaligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 != 0; };
  if (misaligned(destination) || misaligned(source)) return report("cp.async of 16 bytes at a misaligned address");
  check_read(thread, source, source_bytes);
  check_issue(thread, destination, 16);
  std::memset(destination, kPoison, 16);
  thread.copies.push_back({destination, source, source_bytes, thread.copy_group});
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
    check_write(thread, copy.destination, 16);
    if (copy.source_bytes) std::memcpy(copy.destination, copy.source, copy.source_bytes);
    std::memset(static_cast<char*>(copy.destination) + copy.source_bytes, 0, 16 - copy.source_bytes);
  }
  thread.copies.resize(kept);
}

}  // namespace cuda_on_host
