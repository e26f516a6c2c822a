// Instruction conformance of hopper.cuh, as conformance.cu is of ptx.cuh: tensor copies and wgmma on inputs whose results
// are exact, what lies in shared memory or comes out printed word by word.
//   host: build/cuda_on_host/conformance_sm90      device: nvcc -std=c++20 -gencode arch=compute_90a,code=sm_90a ...
#include <cstdio>
#include <cstring>
#include <vector>

#include "hopper.cuh"

using namespace dlkern::cuda;

namespace {

constexpr int kWords = 4096;  // of the result of each case
constexpr int kTile = 64 * 64;  // elements of a tile, 64 rows of 128 bytes
constexpr int kImage[4] = {72, 7, 5, 3};  // c, w, h, n
constexpr int kRows = 100, kColumns = 136;

struct Coordinates {
  int at[4], offset[2];
};

// One copy of 64 rows, and what it left in shared memory.
template <bool IM2COL>
__global__ void __launch_bounds__(128, 1)
    copy_case(const __grid_constant__ TensorMap map, const __grid_constant__ Coordinates c, uint32_t* out) {
#ifdef DLKERN_HOPPER
  DLKERN_DYNAMIC_SHARED(shared);
  DLKERN_SHARED(uint64_t, barrier, [1]);
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    mbarrier_init_fence();
    mbarrier_arrive_expect(barrier, 2 * kTile);
    if (IM2COL)
      tensor_copy_im2col(shared, map, barrier, c.at[0], c.at[1], c.at[2], c.at[3], c.offset[0], c.offset[1]);
    else
      tensor_copy_2d(shared, map, barrier, c.at[0], c.at[1]);
  }
  __syncthreads();
  mbarrier_wait(barrier, 0);
  for (int i = static_cast<int>(threadIdx.x); i < kTile / 2; i += 128)
    out[i] = reinterpret_cast<const uint32_t*>(shared)[i];
#endif
}

// Two products of small integers: k 0..15 and 48..63 of two tiles that one thread copies, k last or k first.
template <class T, bool A_FIRST, bool B_FIRST>
__global__ void __launch_bounds__(128, 1) product_case(const __grid_constant__ TensorMap map, uint32_t* out) {
#ifdef DLKERN_HOPPER
  DLKERN_DYNAMIC_SHARED(shared);
  DLKERN_SHARED(uint64_t, barrier, [1]);
  T* const a = reinterpret_cast<T*>(shared);
  T* const b = a + kTile;
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    mbarrier_init_fence();
    mbarrier_arrive_expect(barrier, 4 * kTile);
    tensor_copy_2d(a, map, barrier, 0, 0);
    tensor_copy_2d(b, map, barrier, 64, 32);
  }
  __syncthreads();
  mbarrier_wait(barrier, 0);
  float c[32];
  wgmma_fence(c);
  for (int k = 0; k < 64; k += 48) {
    wgmma<T, A_FIRST, B_FIRST>(c, matrix_descriptor(a + k * (A_FIRST ? 64 : 1), 16),
                               matrix_descriptor(b + k * (B_FIRST ? 64 : 1), 16), k > 0);
  }
  wgmma_commit();
  wgmma_wait_all(c);
#pragma unroll
  for (int i = 0; i < 32; i++) memcpy(out + 32 * threadIdx.x + i, &c[i], 4);
#endif
}

// Elements that a kernel sees, and their copy on the host.
struct Memory {
  std::vector<uint4> blocks;
  uint32_t* const host;
  uint32_t* device;

  explicit Memory(int words) : blocks(static_cast<size_t>(words) / 4), host(&blocks[0].x), device(host) {
#ifdef __CUDACC__
    throw_on_error(cudaMalloc(&device, bytes()), "cudaMalloc");
#endif
  }
  size_t bytes() const { return blocks.size() * 16; }
  void to_device() {
#ifdef __CUDACC__
    throw_on_error(cudaMemcpy(device, host, bytes(), cudaMemcpyHostToDevice), "copy");
#endif
  }
  void to_host() {
#ifdef __CUDACC__
    throw_on_error(cudaMemcpy(host, device, bytes(), cudaMemcpyDeviceToHost), "copy");
#endif
  }
};

template <class... Parameters, class... Arguments>
void run(const char* name, void (*kernel)(Parameters...), int words, const Arguments&... arguments) {
  Memory out(kWords);
  out.to_device();
  launch(name, kernel, dim3(1), dim3(128), 4 * kTile, nullptr, false, arguments..., out.device);
  out.to_host();
  for (int i = 0; i < words; i += 4) {
    std::printf("%s %d: %08x %08x %08x %08x\n", name, i, out.host[i], out.host[i + 1], out.host[i + 2],
                out.host[i + 3]);
  }
}

void need(bool made) {
  if (!made) throw std::runtime_error("no tensor map");
}

// A matrix whose element i is i % 29 - 14.
template <class Rounding>
Memory matrix(Rounding rounded) {
  Memory in(kRows * kColumns / 2);
  for (int i = 0; i < kRows * kColumns; i++) {
    const auto value = rounded(static_cast<float>(i % 29 - 14));
    std::memcpy(reinterpret_cast<char*>(in.host) + 2 * i, &value, 2);
  }
  in.to_device();
  return in;
}

template <class T>
void products(const TensorMap& map) {
  run("product", product_case<T, false, false>, kWords, map);
  run("product", product_case<T, false, true>, kWords, map);
  run("product", product_case<T, true, false>, kWords, map);
  run("product", product_case<T, true, true>, kWords, map);
}

}  // namespace

int main() {
  const Memory in = matrix([](float value) { return __float2bfloat16(value); });
  const Memory in_half = matrix([](float value) { return __float2half(value); });
  TensorMap map, half_map;
  need(make_tiled_map(map, in.device, 2, {kColumns, kRows, 1}, {kColumns, 0}, 64));
  need(make_tiled_map(half_map, in_half.device, 2, {kColumns, kRows, 1}, {kColumns, 0}, 64));
  run("copy", copy_case<false>, kTile / 2, map, Coordinates{{8, 3}, {}});
  run("copy", copy_case<false>, kTile / 2, map, Coordinates{{96, 60}, {}});
  run("copy", copy_case<false>, kTile / 2, map, Coordinates{{-8, -5}, {}});
  products<bf16>(map);
  products<fp16>(half_map);

  // A filter of 3 x 2, padding 1 and 2, dilation 1 and 3; steps of 2 and 1.
  const int64_t size[4] = {kImage[0], kImage[1], kImage[2], kImage[3]};
  const int64_t stride[3] = {kImage[0], kImage[0] * kImage[1], int64_t{kImage[0]} * kImage[1] * kImage[2]};
  need(make_im2col_map(map, in.device, size, stride, {-1, -2}, {-1, -1}, {2, 1}, 64));
  run("im2col", copy_case<true>, kTile / 2, map, Coordinates{{0, -1, -2, 0}, {0, 0}});
  run("im2col", copy_case<true>, kTile / 2, map, Coordinates{{64, 1, 0, 1}, {2, 3}});
  return 0;
}
