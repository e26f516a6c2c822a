// Atomics: threads run one at a time, so a plain addition is atomic.
#include "checker.h"
#include "machine.h"

namespace {

template <class T>
T add(T* address, T value) {
  using namespace cuda_on_host;
  check_atomic(*machine.current, address, sizeof(T));
  const T before = *address;
  *address = before + value;
  return before;
}

}  // namespace

int atomicAdd(int* address, int value) { return add(address, value); }
unsigned atomicAdd(unsigned* address, unsigned value) { return add(address, value); }
float atomicAdd(float* address, float value) { return add(address, value); }
