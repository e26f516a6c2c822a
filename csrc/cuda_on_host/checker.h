// The checked build's detector of races, uninitialised reads and accesses out of bounds.
//
// Only one thread runs at a time, so all accesses lie on one line of time, counted by machine.clock, which each
// synchronisation advances. An access by one thread is ordered before a later one by another exactly when a
// synchronisation of both lies between: a __syncthreads of their block, a __syncwarp of their warp, a grid sync, a
// counter that one block added to and the other read (counters.cpp), or the next launch. Whether it does can be read off
// the two times, whatever order the threads ran in. What mbarriers order is each thread's own: Known, in machine.h.
// The copy engine (a writer, one a mbarrier) and each warpgroup's wgmma (a reader) count as threads that synchronise
// through mbarriers and wgmma.wait_group alone.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "machine.h"

namespace cuda_on_host {

inline constexpr size_t kArenaBytes = 256 * 1024;  // shared memory of a block, red zones included

// A thread's number in the launch: its warp's number times 64, plus its lane. The numbers between serve for readers
// that are several threads.
inline uint32_t thread_id(uint32_t block, uint32_t warps_per_block, uint32_t thread) {
  return (block * warps_per_block + thread / 32) * 64 + thread % 32;
}
inline constexpr uint32_t kSeveralLanes = 32;  // of that warp
inline constexpr uint32_t kSeveralWarps = 33;  // of the block whose first warp that is
inline constexpr uint32_t kCopyEngine = 34;  // and on: that of the mbarrier, see engine_id
inline constexpr uint32_t kSeveralBlocks = 0xffffffffu;

struct Access {
  uint32_t thread = 0, time = 0;  // time 0: there was none
};

// What is remembered of one byte.
struct Shadow {
  Access write, read;
  bool atomic = false;  // the write was an atomic one
  bool arrived = false;  // false while an asynchronous copy is under way
};

#ifdef DLKERN_CHECKED
void check_read(Thread& thread, const void* address, size_t bytes);
void check_shared_read(Thread& thread, const void* address, size_t bytes);  // must be in shared memory
void check_write(Thread& thread, const void* address, size_t bytes);
void check_issue(Thread& thread, const void* address, size_t bytes);  // of a copy that will write there
void check_atomic(Thread& thread, const void* address, size_t bytes);
void check_new_array(Block& block, size_t offset, size_t bytes);
void check_tensor_issue(Thread& thread, const void* address, size_t bytes);
void mark_copied(Block& block, const void* address, size_t bytes, size_t mbarrier);
// Of wgmma, element by element; false after a finding. `note`: remembers the read as that warpgroup's.
bool check_operand(Thread& thread, Block& block, uint32_t offset, size_t group, bool note);
#else
inline void check_read(Thread&, const void*, size_t) {}
inline void check_shared_read(Thread&, const void*, size_t) {}
inline void check_write(Thread&, const void*, size_t) {}
inline void check_issue(Thread&, const void*, size_t) {}
inline void check_atomic(Thread&, const void*, size_t) {}
inline void check_new_array(Block&, size_t, size_t) {}
inline void check_tensor_issue(Thread&, const void*, size_t) {}
inline void mark_copied(Block&, const void*, size_t, size_t) {}
inline bool check_operand(Thread&, Block&, uint32_t, size_t, bool) { return true; }
#endif

}  // namespace cuda_on_host
