// Shared memory of a block: one range, in which arrays lie between red zones. Everything starts as NaN; a write into a
// red zone is found when the block ends (at once in the checked build and under AddressSanitizer).
#include <sys/mman.h>

#include <new>

#include "checker.h"
#include "machine.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#define DLKERN_POISON(address, bytes) __asan_poison_memory_region(address, bytes)
#define DLKERN_UNPOISON(address, bytes) __asan_unpoison_memory_region(address, bytes)
#else
#define DLKERN_POISON(address, bytes) ((void)0)
#define DLKERN_UNPOISON(address, bytes) ((void)0)
#endif

namespace cuda_on_host {

namespace {

constexpr size_t kRedZone = 256;
constexpr size_t kAlignment = 1024;  // the strictest any instruction asks of shared memory (TMA's swizzle)
constexpr unsigned char kRedZoneByte = 0xfb;
// What a launch may have unless it asks for more, as launch() in csrc/cuda/platform.cuh does by its dynamic part alone.
constexpr size_t kUnaskedLimit = 48 * 1024;

// The next array: red zone, array, red zone. Red zones overlap those of the neighbours.
size_t carve(Block& block, const void* tag, size_t bytes) {
  const size_t offset = (block.memory_used + kRedZone + kAlignment - 1) / kAlignment * kAlignment;
  const size_t end = offset + bytes + kRedZone;
  if (end > kArenaBytes) {
    report("static shared memory does not fit");
    return kRedZone;
  }
  DLKERN_UNPOISON(block.memory + block.memory_used, end - block.memory_used);
  std::memset(block.memory + block.memory_used, kRedZoneByte, end - block.memory_used);
  std::memset(block.memory + offset, kPoison, bytes);
  DLKERN_POISON(block.memory + block.memory_used, offset - block.memory_used);
  DLKERN_POISON(block.memory + offset + bytes, kRedZone);
  block.arrays.push_back({tag, offset, bytes});
  block.memory_used = offset + bytes;
  check_new_array(block, offset, bytes);
  return offset;
}

// CUDA counts static and dynamic arrays together. The dynamic part begins at a multiple of 1024 bytes, behind the static
// arrays.
void check_total(const Block& block) {
  const size_t dynamic = block.arrays[0].bytes;
  size_t fixed = 0;
  for (size_t i = 1; i < block.arrays.size(); i++) fixed += (block.arrays[i].bytes + 15) / 16 * 16;
  if (dynamic) fixed = (fixed + kAlignment - 1) / kAlignment * kAlignment;
  const size_t limit = dynamic > kUnaskedLimit ? settings.shared_bytes : kUnaskedLimit;
  if (fixed + dynamic > limit)
    report("%zu bytes of shared memory, %zu of them dynamic; this launch may have %zu", fixed + dynamic, dynamic,
           limit);
}

}  // namespace

void shared_begin(Block& block, size_t dynamic_bytes) {
  if (!block.memory) {
    void* memory =
        mmap(nullptr, kArenaBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    block.memory = static_cast<unsigned char*>(memory);
  }
  block.memory_used = 0;
  block.arrays.clear();
  carve(block, nullptr, dynamic_bytes);
}

void shared_end(Block& block) {
  size_t zone = 0;
  check_total(block);
  DLKERN_UNPOISON(block.memory, block.memory_used + kRedZone);
  for (const SharedArray& array : block.arrays) {
    for (size_t i = zone; i < array.offset; i++) {
      if (block.memory[i] != kRedZoneByte) return report("a write to shared memory before the start of an array");
    }
    zone = array.offset + array.bytes;
  }
  for (size_t i = zone; i < zone + kRedZone; i++) {
    if (block.memory[i] != kRedZoneByte) return report("a write to shared memory behind the end of an array");
  }
}

void* dynamic_shared() {
  const Block& block = *machine.current->block;
  return block.memory + block.arrays[0].offset;
}

void* static_shared(const void* tag, size_t bytes) {
  Block& block = *machine.current->block;
  for (const SharedArray& array : block.arrays) {
    if (array.tag == tag) return block.memory + array.offset;
  }
  return block.memory + carve(block, tag, bytes);
}

}  // namespace cuda_on_host
