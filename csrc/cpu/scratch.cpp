#include "scratch.h"

#include <cstdlib>
#include <new>

namespace dlkern::cpu {

namespace {
struct Buffers {
  void* data[static_cast<int>(Slot::count)] = {};
  size_t size[static_cast<int>(Slot::count)] = {};
  ~Buffers() {
    for (void* p : data) std::free(p);
  }
};
thread_local Buffers buffers;
}  // namespace

void* scratch(Slot slot, size_t bytes) {
  const int i = static_cast<int>(slot);
  if (buffers.size[i] < bytes || !buffers.data[i]) {
    // Freed first, so that growing never holds both; a page more than asked, so that vectors may read past the end.
    std::free(buffers.data[i]);
    buffers.data[i] = nullptr;
    buffers.size[i] = 0;
    const size_t rounded = (bytes + 4096 + 4095) / 4096 * 4096;
    buffers.data[i] = std::aligned_alloc(64, rounded);
    if (!buffers.data[i]) throw std::bad_alloc();
    buffers.size[i] = rounded;
  }
  return buffers.data[i];
}

}  // namespace dlkern::cpu
