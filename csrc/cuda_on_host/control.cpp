// Findings and settings; the C functions are those that dlkern.testing.cuda_on_host calls.
#include "control.h"

#include <cstdarg>
#include <cstdio>
#include <string>

#include "machine.h"

namespace cuda_on_host {

static int64_t finding_count;
static std::string messages;  // of the first few, a line each

std::recursive_mutex launch_mutex;

int64_t findings() { return finding_count; }

bool looks_at_indices() { return settings.looks_at_indices; }

void report(const char* format, ...) {
  if (++finding_count > 20) return;
  char text[400];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  messages += std::string(machine.kernel) + ": " + text;
  if (const Thread* thread = machine.current) {
    std::snprintf(text, sizeof text, " [block %u,%u,%u thread %u,%u,%u]", thread->block->index.x,
                  thread->block->index.y, thread->block->index.z, thread->index.x, thread->index.y, thread->index.z);
    messages += text;
  }
  messages += '\n';
}

}  // namespace cuda_on_host

#define EXPORT extern "C" [[gnu::visibility("default")]]

EXPORT int64_t cuda_on_host_errors() { return cuda_on_host::finding_count; }

EXPORT const char* cuda_on_host_messages() { return cuda_on_host::messages.c_str(); }

EXPORT void cuda_on_host_clear() {
  cuda_on_host::finding_count = 0;
  cuda_on_host::messages.clear();
}

// order: 0 forward, 1 reverse, 2 random by `seed`.
EXPORT void cuda_on_host_set_order(int order, unsigned seed) {
  cuda_on_host::settings.order = static_cast<cuda_on_host::Order>(order);
  cuda_on_host::settings.seed = seed;
}

// How many multiprocessors the device has that the launchers ask about.
EXPORT void cuda_on_host_set_multiprocessors(int count) { cuda_on_host::settings.multiprocessors = count; }

// How much shared memory a block of that device may have.
EXPORT void cuda_on_host_set_shared_bytes(int64_t count) {
  cuda_on_host::settings.shared_bytes = static_cast<size_t>(count);
}

// Whether that device is a Hopper.
EXPORT void cuda_on_host_set_hopper(int hopper) { cuda_on_host::settings.hopper = hopper != 0; }

// How many items kernels may number in one launch.
EXPORT void cuda_on_host_set_most_numbers(int64_t count) { cuda_on_host::settings.most_numbers = count; }

// Whether ops raise where an index is out of range.
EXPORT void cuda_on_host_set_looks_at_indices(int looks) { cuda_on_host::settings.looks_at_indices = looks != 0; }

// Name of the latest kernel.
EXPORT const char* cuda_on_host_last_kernel() { return cuda_on_host::machine.kernel; }

EXPORT int cuda_on_host_is_checked() {
#ifdef DLKERN_CHECKED
  return 1;
#else
  return 0;
#endif
}
