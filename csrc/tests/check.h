// What the C++ tests share: a check that counts, random values that are the same every run, and memory whose end is
// the end of a page that nothing may touch, so that a read or write one element too far stops the program.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstring>

namespace dlkern::test {

inline int failures = 0;

#define CHECK(condition, ...)                                     \
  do {                                                            \
    if (!(condition) && ++dlkern::test::failures <= 20) {         \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                   \
      std::printf("\n");                                          \
    }                                                             \
  } while (0)

constexpr int kSkipped = 77;

inline int report(const char* name) {
  std::printf("%s: %s (%d failed checks)\n", name, failures ? "FAILED" : "ok", failures);
  return failures ? 1 : 0;
}

// Whether this CPU runs what the file was compiled for.
inline bool cpu_has_this_instruction_set() {
#if defined(__x86_64__)
  __builtin_cpu_init();
#if defined(__AVX512F__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#elif defined(__AVX2__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
#endif
  return true;
}

// Knuth's 64-bit linear congruential generator.
struct Random {
  uint64_t state = 1;
  uint32_t bits() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state >> 32);
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(bits() % static_cast<uint64_t>(n)); }
  double value() { return bits() / 4294967296.0 * 2 - 1; }  // in [-1, 1)
  template <class X, int N> X one_of(const X (&choices)[N]) { return choices[below(N)]; }
};

// `count` elements that end where a page nothing may touch begins.
template <class T> class Guarded {
 public:
  explicit Guarded(int64_t count) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), bytes = static_cast<size_t>(count) * sizeof(T);
    length_ = (bytes + page - 1) / page * page + page;
    base_ = static_cast<char*>(mmap(nullptr, length_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(base_ + length_ - page, page, PROT_NONE);
    data_ = reinterpret_cast<T*>(base_ + length_ - page - bytes);
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() { munmap(base_, length_); }
  T* data() { return data_; }
  T& operator[](int64_t i) { return data_[i]; }

 private:
  char* base_;
  size_t length_;
  T* data_;
};

}  // namespace dlkern::test
