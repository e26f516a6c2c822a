// Instruction conformance: runs each function of ptx.cuh, and the warp intrinsics the kernels use, on inputs whose
// results are exact, and prints what every lane received. The same source is built for the host, where it runs the
// twins, and by nvcc for the GPU; the two outputs must be equal, line by line (bench/gpu.sh compares them).
//   host: build/cuda_on_host/conformance      device: nvcc -std=c++20 -arch=native -o conformance conformance.cu
#include <cstdio>
#include <vector>

#include "block_reduce.cuh"
#include "fast_divide.cuh"
#include "grid_sync.cuh"
#include "ptx.cuh"

using namespace dlkern::cuda;

namespace {

constexpr int kWords = 4096;  // of the result of each case

// Any 16-bit pattern: the words are told apart, and nothing here computes with them.
__global__ void ldmatrix_case(const uint32_t* in, uint32_t* out) {
  DLKERN_SHARED(uint4, rows, [32]);
  reinterpret_cast<uint32_t*>(rows)[threadIdx.x] = in[threadIdx.x];
  for (int i = 1; i < 4; i++) reinterpret_cast<uint32_t*>(rows)[32 * i + threadIdx.x] = in[32 * i + threadIdx.x];
  __syncthreads();
  uint32_t fragment[4];
  ldmatrix_x4(fragment, rows + (threadIdx.x * 5) % 32);  // rows in an order of their own
  for (int i = 0; i < 4; i++) out[4 * threadIdx.x + i] = fragment[i];
  ldmatrix_x4_transposed(fragment, rows + (threadIdx.x * 5) % 32);
  for (int i = 0; i < 4; i++) out[128 + 4 * threadIdx.x + i] = fragment[i];
}

// Small integers: exact in whatever order the tensor core adds.
template <class T>
__global__ void mma_case(const uint32_t* in, uint32_t* out) {
  const auto integer = [&](int i) { return static_cast<float>(static_cast<int>(in[i] % 31) - 15); };
  const auto pair = [&](int i) {
    const T halves[2] = {from_float<T>(integer(i)), from_float<T>(integer(i + 1))};
    uint32_t word;
    memcpy(&word, halves, 4);
    return word;
  };
  uint32_t a[4], b[2];
  float c[4];
  for (int i = 0; i < 4; i++) a[i] = pair(static_cast<int>(threadIdx.x) * 16 + 2 * i);
  for (int i = 0; i < 2; i++) b[i] = pair(static_cast<int>(threadIdx.x) * 16 + 8 + 2 * i);
  for (int i = 0; i < 4; i++) c[i] = integer(static_cast<int>(threadIdx.x) * 16 + 12 + i);
  mma_16x8x16<T>(c, a, b[0], b[1]);
  mma_16x8x16<T>(c, a, b[1], b[0]);
  memcpy(out + 4 * threadIdx.x, c, 16);
}

// The same of TF32: one integer a word, with bits below TF32's that must not count.
__global__ void mma_tf32_case(const uint32_t* in, uint32_t* out) {
  const auto integer = [&](int i) {
    return static_cast<float>(static_cast<int>(in[static_cast<int>(threadIdx.x) * 16 + i] % 31) - 15);
  };
  uint32_t a[4], b[2];
  float c[4];
  for (int i = 0; i < 4; i++) a[i] = to_tf32(integer(i)) | 0x1abcu;
  for (int i = 0; i < 2; i++) b[i] = to_tf32(integer(4 + i)) | 0x1fffu;
  for (int i = 0; i < 4; i++) c[i] = integer(6 + i);
  mma_tf32_16x8x8(c, a, b[0], b[1]);
  mma_tf32_16x8x8(c, a, b[1], b[0]);
  memcpy(out + 4 * threadIdx.x, c, 16);
}

// Any float pattern to TF32, NaNs apart.
__global__ void tf32_case(const uint32_t* in, uint32_t* out) {
  for (int i = static_cast<int>(threadIdx.x); i < 1024; i += 32) {
    float value;
    memcpy(&value, in + i, 4);
    out[i] = to_tf32(value == value ? value : 1.0f);
  }
}

// Copies of 16, 8 and 0 source bytes, waited for group by group.
__global__ void cp_async_case(const uint32_t* in, uint32_t* out) {
  DLKERN_SHARED(uint4, staged, [3][32]);
  for (int stage = 0; stage < 3; stage++) {
    cp_async16(&staged[stage][threadIdx.x], in + 4 * (32 * stage + threadIdx.x), 16 - 8 * stage);
    cp_async_commit();
  }
  cp_async_wait<2>();
  __syncthreads();
  memcpy(out + 4 * threadIdx.x, &staged[0][31 - threadIdx.x], 16);
  cp_async_wait<0>();
  __syncthreads();
  for (int stage = 1; stage < 3; stage++)
    memcpy(out + 128 * stage + 4 * threadIdx.x, &staged[stage][31 - threadIdx.x], 16);
}

// Copies of 4 bytes, every third of none.
__global__ void cp_async4_case(const uint32_t* in, uint32_t* out) {
  DLKERN_SHARED(uint32_t, staged, [32]);
  cp_async4(&staged[threadIdx.x], in + 3 * threadIdx.x, threadIdx.x % 3 == 0 ? 0 : 4);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  out[threadIdx.x] = staged[31 - threadIdx.x];
}

__global__ void warp_case(const uint32_t* in, uint32_t* out) {
  const uint32_t value = in[threadIdx.x];
  uint32_t* mine = out + 8 * threadIdx.x;
  mine[0] = __shfl_xor_sync(0xffffffffu, value, 5);
  mine[1] = __shfl_down_sync(0xffffffffu, value, 3);
  mine[2] = __shfl_sync(0xffffffffu, value, (threadIdx.x * 7) % 32);
  mine[3] = __ballot_sync(0xffffffffu, value & 4);
  mine[4] = static_cast<uint32_t>(__popc(value));
  mine[5] = __umulhi(value, 0x9e3779b9u);
  mine[6] = static_cast<uint32_t>(warp_sum(static_cast<float>(value % 64)));
  mine[7] = __any_sync(0xffffffffu, value == in[7]);
}

__global__ void division_case(const uint32_t* in, uint32_t* out, FastDivide by) {
  for (int i = static_cast<int>(threadIdx.x); i < 1024; i += 32)
    out[2 * i] = by.divide(in[i] & 0x7fffffffu, out[2 * i + 1]);
}

// Conversions of any float pattern to bfloat16 or float16 and back, NaNs apart (their payload may differ).
template <class T>
__global__ void conversion_case(const uint32_t* in, uint32_t* out) {
  for (int i = static_cast<int>(threadIdx.x); i < 1024; i += 32) {
    float value;
    memcpy(&value, in + i, 4);
    if (value != value) value = 1.0f;
    const float rounded = to_float(from_float<T>(value));
    memcpy(out + i, &rounded, 4);
  }
}

__global__ void grid_sync_case(const uint32_t* in, uint32_t* out) {
  const uint32_t self = blockIdx.x * blockDim.x + threadIdx.x, count = gridDim.x * blockDim.x;
  out[self] = in[self];
  for (int step = 0; step < 7; step++) {
    grid_sync();
    const uint32_t* from = out + step % 2 * count;
    out[(step + 1) % 2 * count + self] = from[(self + 33) % count] * 3 + from[(self + 1) % count];
  }
}

// The same by a counter, which is the word behind the results.
__global__ void counters_case(const uint32_t* in, uint32_t* out) {
  const uint32_t self = blockIdx.x * blockDim.x + threadIdx.x, count = gridDim.x * blockDim.x;
  uint32_t* const counter = out + 2 * count;
  out[self] = in[self];
  for (uint32_t step = 0; step < 7; step++) {
    __syncthreads();
    if (threadIdx.x == 0) {
      red_release_add(counter, 1);
      while (ld_acquire(counter) < (step + 1) * gridDim.x) spin_wait();
    }
    __syncthreads();
    const uint32_t* from = out + step % 2 * count;
    out[(step + 1) % 2 * count + self] = from[(self + 33) % count] * 3 + from[(self + 1) % count];
  }
}

// Words that a kernel sees, and their copy on the host.
struct Memory {
  std::vector<uint4> blocks = std::vector<uint4>(kWords / 4);
  uint32_t* const host = &blocks[0].x;
  uint32_t* device = host;

#ifdef __CUDACC__
  Memory() { throw_on_error(cudaMalloc(&device, kWords * 4), "cudaMalloc"); }
  ~Memory() { cudaFree(device); }
  void copy_to_device() { throw_on_error(cudaMemcpy(device, host, kWords * 4, cudaMemcpyHostToDevice), "copy"); }
  void copy_from_device() { throw_on_error(cudaMemcpy(host, device, kWords * 4, cudaMemcpyDeviceToHost), "copy"); }
#else
  void copy_to_device() {}
  void copy_from_device() {}
#endif
};

template <class... Arguments>
void run(const char* name, void (*kernel)(const uint32_t*, uint32_t*, Arguments...), int words, int blocks,
         bool cooperative, Arguments... arguments) {
  Memory in, out;
  uint32_t state = 12345;
  for (int i = 0; i < kWords; i++) in.host[i] = state = state * 1664525u + 1013904223u, out.host[i] = 0;
  in.copy_to_device();
  out.copy_to_device();
  launch(name, kernel, dim3(static_cast<unsigned>(blocks)), dim3(32), 0, nullptr, cooperative, in.device, out.device,
         arguments...);
  out.copy_from_device();
  for (int i = 0; i < words; i += 4) {
    std::printf("%s %d: %08x %08x %08x %08x\n", name, i, out.host[i], out.host[i + 1], out.host[i + 2],
                out.host[i + 3]);
  }
}

}  // namespace

int main() {
  run("ldmatrix", ldmatrix_case, 256, 1, false);
  run("mma", mma_case<bf16>, 128, 1, false);
  run("mma", mma_case<fp16>, 128, 1, false);
  run("mma_tf32", mma_tf32_case, 128, 1, false);
  run("tf32", tf32_case, 1024, 1, false);
  run("cp_async", cp_async_case, 384, 1, false);
  run("cp_async4", cp_async4_case, 32, 1, false);
  run("warp", warp_case, 256, 1, false);
  for (int divisor : {1, 2, 3, 7, 224, 65537, 0x7fffffff})
    run("divide", division_case, 2048, 1, false, FastDivide(divisor));
  run("bfloat16", conversion_case<bf16>, 1024, 1, false);
  run("float16", conversion_case<fp16>, 1024, 1, false);
  run("grid_sync", grid_sync_case, 512, 8, true);
  run("counters", counters_case, 512, 8, true);
  return 0;
}
