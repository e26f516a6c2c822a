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

uint32_t engine_id(const Block& block, size_t mbarrier) {
  const size_t warps = block.warps.size();
  return first_id(block) + static_cast<uint32_t>(mbarrier % warps * 64 + kCopyEngine + mbarrier / warps);
}

uint32_t known_time(const Thread& thread, size_t slot) {
  const Known &own = thread.known, &shared = thread.block->known;
  const uint32_t a = slot < own.size() ? own[slot] : 0, b = slot < shared.size() ? shared[slot] : 0;
  return a > b ? a : b;
}

// Whether mbarriers order it.
bool known(const Access& earlier, const Thread& thread) {
  const Block& block = *thread.block;
  const size_t warp = (earlier.thread - first_id(block)) / 64, lane = earlier.thread % 64;
  if (lane >= kCopyEngine) {
    const size_t mbarrier = (lane - kCopyEngine) * block.warps.size() + warp;
    return earlier.time < known_time(thread, block.mbarrier_slot(mbarrier));
  }
  if (lane == kSeveralWarps) return false;  // who they were is not remembered
  if (lane != kSeveralLanes) return earlier.time < known_time(thread, warp * 32 + lane);
  for (size_t i = 0; i < 32; i++) {
    if (earlier.time >= known_time(thread, warp * 32 + i)) return false;
  }
  return true;
}

// Whether a synchronisation lies between an earlier access and one that `thread` makes now.
bool ordered(const Access& earlier, const Thread& thread) {
  if (earlier.time < machine.grid_synced_at || earlier.thread == thread.id) return true;
  const Block& block = *thread.block;
  if (!in_block(earlier.thread, block)) {
    const size_t other = earlier.thread / (block.warps.size() * 64);
    return earlier.thread != kSeveralBlocks && other < block.seen.size() && earlier.time < block.seen[other];
  }
  if (earlier.thread % 64 >= kCopyEngine) return known(earlier, thread);
  if (earlier.time < block.synced_at) return true;
  if (earlier.thread / 64 == thread.id / 64 && earlier.thread % 64 != kSeveralWarps &&
      earlier.time < thread.warp->synced_at)
    return true;
  return any_known(block) && known(earlier, thread);
}

// Whether the asynchronous proxy (copy engine, wgmma) sees what a thread wrote: the writer's first
// fence.proxy.async after it must itself be ordered before `thread`.
bool seen_by_async_proxy(const Access& write, const Thread& thread) {
  const Block& block = *thread.block;
  if (!in_block(write.thread, block) || write.thread % 64 >= kCopyEngine) return true;
  const Thread& writer = block.threads[(write.thread - first_id(block)) / 64 * 32 + write.thread % 64];
  const auto fence = std::lower_bound(writer.proxy_fences.begin(), writer.proxy_fences.end(), write.time);
  return fence != writer.proxy_fences.end() && ordered({write.thread, *fence}, thread);
}

// The reader to remember: `thread`, with whoever read before and is still unordered with it.
uint32_t reader(const Access& earlier, const Thread& thread) {
  if (earlier.time == 0 || ordered(earlier, thread)) return thread.id;
  if (!in_block(earlier.thread, *thread.block)) return kSeveralBlocks;
  if (earlier.thread / 64 == thread.id / 64 && earlier.thread % 64 != kSeveralWarps)
    return thread.id / 64 * 64 + kSeveralLanes;
  return first_id(*thread.block) + kSeveralWarps;
}

enum class Kind { read, write, issue, atomic, tensor_issue, operand };

const char* kind_name(Kind kind) {
  static const char* const names[] = {"read", "write", "cp.async", "atomic", "cp.async.bulk", "wgmma"};
  return names[static_cast<int>(kind)];
}
bool is_async(Kind kind) { return kind == Kind::tensor_issue || kind == Kind::operand; }

void check_byte(Shadow& shadow, const Thread& thread, Kind kind, const char* where) {
  const Access now{thread.id, machine.clock};
  const bool atomic = kind == Kind::atomic;
  const bool write_unordered = shadow.write.time && !ordered(shadow.write, thread) && !(atomic && shadow.atomic);
  if (kind == Kind::read || atomic || kind == Kind::operand) {
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
  if (is_async(kind) && shadow.write.time && !seen_by_async_proxy(shadow.write, thread)) {
    report("%s of %s after a thread's write with no fence.proxy.async between", kind_name(kind), where);
    shadow.write = Access{engine_id(*thread.block, 0), 0};
  }
  if (kind == Kind::operand) return;  // see operand_reads
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
  shadow.arrived = kind != Kind::issue && kind != Kind::tensor_issue;
}

// A write to what wgmma was issued to read, and nobody waited for.
void check_operand_reads(const Block& block, size_t offset, size_t bytes, const Thread& thread, Kind kind) {
  if (!block.operand_reads || kind == Kind::read || kind == Kind::operand) return;
  for (size_t piece = offset / 16; piece * 16 < offset + bytes; piece++) {
    for (size_t group = 0; group < block.warpgroups.size(); group++) {
      uint32_t& time = block.operand_reads[piece][group];
      if (time == 0 || time < known_time(thread, block.warpgroup_slot(group))) continue;
      report("race in shared memory: %s of what a wgmma not waited for reads", kind_name(kind));
      time = 0;
      return;
    }
  }
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
      check_operand_reads(block, offset, bytes, thread, kind);
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

// The tensor cores' accumulators lie on the thread's stack.
void check_registers(const Thread& thread, const char* address, Kind kind) {
  for (const Sum* sum : thread.sums) {
    const int rank = static_cast<int>(thread.warp - thread.block->warps.data()) % 4 * 32 + thread.lane;
    const auto* c = reinterpret_cast<const char*>(sum->registers[rank]);
    if (address >= c && address < c + sum->columns * 2)
      report("%s of an accumulator that wgmma is still to fill", kind_name(kind));
  }
}

void check(Thread& thread, const void* pointer, size_t bytes, Kind kind) {
  const char* address = static_cast<const char*>(pointer);
  if (static_cast<size_t>(address - thread.fiber.stack) < kStackBytes) return check_registers(thread, address, kind);
  if (in_this_library(address) || bytes == 0) return;
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

void check_tensor_issue(Thread& thread, const void* address, size_t bytes) {
  if (!check_shared(thread, static_cast<const char*>(address), bytes, Kind::tensor_issue))
    report("cp.async.bulk to outside shared memory");
}

void mark_copied(Block& block, const void* address, size_t bytes, size_t mbarrier) {
  Shadow* shadow = block.shadow + (static_cast<const unsigned char*>(address) - block.memory);
  const Access write{engine_id(block, mbarrier), machine.clock};
  for (size_t i = 0; i < bytes; i++) shadow[i] = Shadow{write, {}, false, true};
}

bool check_operand(Thread& thread, Block& block, uint32_t offset, size_t group, bool note) {
  const int64_t before = findings();
  if (!check_shared(thread, reinterpret_cast<const char*>(block.memory) + offset, 2, Kind::operand))
    report("wgmma reads outside shared memory");
  if (findings() != before) return false;
  if (!block.operand_reads) block.operand_reads = new uint32_t[kArenaBytes / 16][8]();
  if (note) block.operand_reads[offset / 16][group] = machine.clock;
  return true;
}

void check_new_array(Block& block, size_t offset, size_t bytes) {
  if (!block.shadow) block.shadow = new Shadow[kArenaBytes];  // kept, as blocks are
  std::fill_n(block.shadow + offset, bytes, Shadow{});
  if (block.operand_reads)
    std::memset(block.operand_reads[offset / 16], 0, (bytes + 15) / 16 * sizeof *block.operand_reads);
}

void track_tensor(const void* data, size_t bytes, bool written, bool kept) {
  const char* begin = static_cast<const char*>(data);
  Shadow first{};
  if (kept) first.write = {0, machine.clock}, first.arrived = true;  // before the next launch
  tensors.push_back({begin, begin + bytes, written, std::vector<Shadow>(written ? bytes : 0, first)});
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
