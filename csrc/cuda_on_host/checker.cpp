// The race detector (see checker.h) and the hooks that code compiled with -fsanitize=thread calls at each load and
// store. This file itself is compiled without that flag, and libtsan is not linked.
#ifdef DLKERN_CHECKED
#include "checker.h"

#include <algorithm>
#include <string>

#include "control.h"

namespace cuda_on_host {

namespace {

struct TrackedTensor {
  const char *begin, *end;
  bool written;  // a result; others are read only
  std::vector<Shadow> shadow;
};
std::vector<TrackedTensor> tensors;

uint32_t first_id(const Block& block) { return block.threads[0].id; }

bool in_block(uint32_t id, const Block& block) { return id - first_id(block) < block.warps.size() * 64; }

// Whether a synchronisation lies between an earlier access and one that `thread` makes now.
bool ordered(const Access& earlier, const Thread& thread) {
  if (earlier.time < machine.grid_synced_at || earlier.thread == thread.id) return true;
  const Block& block = *thread.block;
  if (!in_block(earlier.thread, block)) {
    const size_t other = earlier.thread / (block.warps.size() * 64);
    return earlier.thread != kSeveralBlocks && other < block.seen.size() && earlier.time < block.seen[other];
  }
  if (earlier.time < block.synced_at) return true;
  return earlier.thread / 64 == thread.id / 64 && earlier.thread % 64 != kSeveralWarps &&
         earlier.time < thread.warp->synced_at;
}

// The reader to remember: `thread`, with whoever read before and is still unordered with it.
uint32_t reader(const Access& earlier, const Thread& thread) {
  if (earlier.time == 0 || ordered(earlier, thread)) return thread.id;
  if (!in_block(earlier.thread, *thread.block)) return kSeveralBlocks;
  if (earlier.thread / 64 == thread.id / 64 && earlier.thread % 64 != kSeveralWarps)
    return thread.id / 64 * 64 + kSeveralLanes;
  return first_id(*thread.block) + kSeveralWarps;
}

enum class Kind { read, write, issue, atomic };

const char* kind_name(Kind kind) {
  return kind == Kind::read ? "read" : kind == Kind::atomic ? "atomic" : kind == Kind::issue ? "cp.async" : "write";
}

void check_byte(Shadow& shadow, const Thread& thread, Kind kind, const char* where) {
  const Access now{thread.id, machine.clock};
  const bool atomic = kind == Kind::atomic;
  const bool write_unordered = shadow.write.time && !ordered(shadow.write, thread) && !(atomic && shadow.atomic);
  if (kind == Kind::read || atomic) {
    if (shadow.write.time == 0) {
      report("read of %s nobody wrote", where);
      shadow.write = now, shadow.arrived = true;
      return;
    }
    if (!shadow.arrived) {
      report("read of %s that cp.async is still to fill", where);
      shadow.arrived = true;
      return;
    }
  }
  if (write_unordered) {
    report("race in %s: %s after another thread's write with no barrier between", where, kind_name(kind));
    shadow.write = now, shadow.arrived = true;
    return;
  }
  if (kind == Kind::read) {
    shadow.read = {reader(shadow.read, thread), machine.clock};
    return;
  }
  if (shadow.read.time && !ordered(shadow.read, thread)) {
    report("race in %s: %s after another thread's read with no barrier between", where, kind_name(kind));
    shadow.read = Access{};
  }
  shadow.write = now;
  shadow.atomic = atomic;
  shadow.arrived = kind != Kind::issue;
}

void check_bytes(Shadow* shadow, size_t bytes, const Thread& thread, Kind kind, const char* where) {
  // One report an access, not one a byte.
  const int64_t before = findings();
  for (size_t i = 0; i < bytes; i++) {
    if (findings() == before)
      check_byte(shadow[i], thread, kind, where);
    else
      shadow[i].write = {thread.id, machine.clock}, shadow[i].arrived = true, shadow[i].read = Access{};
  }
}

bool check_shared(Thread& thread, const char* address, size_t bytes, Kind kind) {
  const Block& block = *thread.block;
  const size_t offset = address - reinterpret_cast<const char*>(block.memory);
  if (offset >= kArenaBytes) return false;  // also where address is below memory
  for (const SharedArray& array : block.arrays) {
    if (offset >= array.offset && offset + bytes <= array.offset + array.bytes) {
      check_bytes(block.shadow + offset, bytes, thread, kind, "shared memory");
      return true;
    }
  }
  report("%s of shared memory outside every array", kind_name(kind));
  return true;
}

// This library's own code and data: threadIdx, constants, the kernel's arguments.
extern "C" [[gnu::visibility("hidden")]] const char __ehdr_start[];
extern "C" [[gnu::visibility("hidden")]] const char _end[];
bool in_this_library(const char* address) { return address >= __ehdr_start && address < _end; }

void check(Thread& thread, const void* pointer, size_t bytes, Kind kind) {
  const char* address = static_cast<const char*>(pointer);
  if (static_cast<size_t>(address - thread.fiber.stack) < kStackBytes || in_this_library(address) || bytes == 0) return;
  if (check_shared(thread, address, bytes, kind)) return;
  for (TrackedTensor& tensor : tensors) {
    if (address < tensor.begin || address + bytes > tensor.end) continue;
    if (tensor.written)
      check_bytes(&tensor.shadow[address - tensor.begin], bytes, thread, kind, "a result");
    else if (kind != Kind::read)
      report("write to an input");
    return;
  }
  report("%s of global memory outside every tensor", kind_name(kind));
}

}  // namespace

void check_read(Thread& thread, const void* address, size_t bytes) { check(thread, address, bytes, Kind::read); }
void check_write(Thread& thread, const void* address, size_t bytes) { check(thread, address, bytes, Kind::write); }
void check_atomic(Thread& thread, const void* address, size_t bytes) { check(thread, address, bytes, Kind::atomic); }

void check_shared_read(Thread& thread, const void* address, size_t bytes) {
  if (!check_shared(thread, static_cast<const char*>(address), bytes, Kind::read))
    report("ldmatrix from outside shared memory");
}

void check_issue(Thread& thread, const void* address, size_t bytes) {
  if (!check_shared(thread, static_cast<const char*>(address), bytes, Kind::issue))
    report("cp.async to outside shared memory");
}

void check_new_array(Block& block, size_t offset, size_t bytes) {
  if (!block.shadow) block.shadow = new Shadow[kArenaBytes];  // kept, as blocks are
  std::fill_n(block.shadow + offset, bytes, Shadow{});
}

void track_tensor(const void* data, size_t bytes, bool written) {
  const char* begin = static_cast<const char*>(data);
  tensors.push_back({begin, begin + bytes, written, std::vector<Shadow>(written ? bytes : 0)});
}

void forget_tensors() { tensors.clear(); }

}  // namespace cuda_on_host

// The hooks. Hidden, so that they serve this library alone.
#define HOOK(name, ...) extern "C" [[gnu::visibility("hidden")]] void name(__VA_ARGS__)
#define ACCESS_HOOKS(form, bytes)                                                                           \
  HOOK(__tsan_##form##read##bytes, void* p) {                                                               \
    if (cuda_on_host::machine.current) cuda_on_host::check_read(*cuda_on_host::machine.current, p, bytes);  \
  }                                                                                                         \
  HOOK(__tsan_##form##write##bytes, void* p) {                                                              \
    if (cuda_on_host::machine.current) cuda_on_host::check_write(*cuda_on_host::machine.current, p, bytes); \
  }
#define ACCESS_HOOKS_OF_SIZE(bytes) ACCESS_HOOKS(, bytes) ACCESS_HOOKS(unaligned_, bytes) ACCESS_HOOKS(volatile_, bytes)
ACCESS_HOOKS_OF_SIZE(1)
ACCESS_HOOKS_OF_SIZE(2)
ACCESS_HOOKS_OF_SIZE(4)
ACCESS_HOOKS_OF_SIZE(8)
ACCESS_HOOKS_OF_SIZE(16)
HOOK(__tsan_read_range, void* p, size_t bytes) {
  if (cuda_on_host::machine.current) cuda_on_host::check_read(*cuda_on_host::machine.current, p, bytes);
}
HOOK(__tsan_write_range, void* p, size_t bytes) {
  if (cuda_on_host::machine.current) cuda_on_host::check_write(*cuda_on_host::machine.current, p, bytes);
}
HOOK(__tsan_init) {}
HOOK(__tsan_func_entry, void*) {}
HOOK(__tsan_func_exit) {}
HOOK(__tsan_vptr_update, void**, void*) {}
HOOK(__tsan_vptr_read, void**) {}

#endif  // DLKERN_CHECKED
