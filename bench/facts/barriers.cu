// What a barrier costs on this GPU: the figures that decide how a recurrent layer's steps are synchronised.
// Kernels that do nothing but R barriers are timed for two values of R; the difference over the difference is one
// barrier. Prints one JSON object.
#include <cooperative_groups.h>
#include <cstdio>
#include <cstdlib>

namespace cg = cooperative_groups;

#define CHECK(call)                                                                     \
  do {                                                                                  \
    cudaError_t error = (call);                                                         \
    if (error != cudaSuccess) {                                                         \
      std::fprintf(stderr, "%s: %s\n", #call, cudaGetErrorString(error));              \
      std::exit(1);                                                                     \
    }                                                                                   \
  } while (0)

// One counter: each block adds one and waits until all of this round have.
__global__ void counter_barrier_kernel(unsigned* counter, int rounds) {
  for (int r = 0; r < rounds; ++r) {
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      atomicAdd(counter, 1u);
      const unsigned wanted = (r + 1) * gridDim.x;
      while (*(volatile unsigned*)counter < wanted) {
      }
      __threadfence();
    }
    __syncthreads();
  }
}

__global__ void grid_barrier_kernel(unsigned*, int rounds) {
  cg::grid_group grid = cg::this_grid();
  for (int r = 0; r < rounds; ++r) grid.sync();
}

__global__ void cluster_barrier_kernel(unsigned*, int rounds) {
  cg::cluster_group cluster = cg::this_cluster();
  for (int r = 0; r < rounds; ++r) cluster.sync();
}

__global__ void block_barrier_kernel(unsigned*, int rounds) {
  for (int r = 0; r < rounds; ++r) __syncthreads();
}

using Kernel = void (*)(unsigned*, int);

// Milliseconds of the fastest of several launches.
static float launch(Kernel kernel, int blocks, int threads, int cluster, bool cooperative, unsigned* counter, int rounds) {
  float best = 1e30f;
  cudaEvent_t start, stop;
  CHECK(cudaEventCreate(&start));
  CHECK(cudaEventCreate(&stop));
  for (int repeat = 0; repeat < 8; ++repeat) {
    CHECK(cudaMemset(counter, 0, sizeof(unsigned)));
    cudaLaunchAttribute attribute[2];
    cudaLaunchConfig_t config{};
    config.gridDim = blocks;
    config.blockDim = threads;
    config.attrs = attribute;
    if (cluster > 1) {
      attribute[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
      attribute[config.numAttrs].val.clusterDim.x = cluster;
      attribute[config.numAttrs].val.clusterDim.y = attribute[config.numAttrs].val.clusterDim.z = 1;
      ++config.numAttrs;
    }
    if (cooperative) {
      attribute[config.numAttrs].id = cudaLaunchAttributeCooperative;
      attribute[config.numAttrs].val.cooperative = 1;
      ++config.numAttrs;
    }
    CHECK(cudaEventRecord(start));
    CHECK(cudaLaunchKernelEx(&config, kernel, counter, rounds));
    CHECK(cudaEventRecord(stop));
    CHECK(cudaEventSynchronize(stop));
    float ms = 0;
    CHECK(cudaEventElapsedTime(&ms, start, stop));
    if (ms < best) best = ms;
  }
  CHECK(cudaEventDestroy(start));
  CHECK(cudaEventDestroy(stop));
  return best;
}

static float barrier_us(Kernel kernel, int blocks, int threads, int cluster, bool cooperative, unsigned* counter) {
  const int few = 100, many = 2100;
  const float a = launch(kernel, blocks, threads, cluster, cooperative, counter, few);
  const float b = launch(kernel, blocks, threads, cluster, cooperative, counter, many);
  return (b - a) * 1e3f / (many - few);
}

int main() {
  int sms = 0;
  CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0));
  unsigned* counter;
  CHECK(cudaMalloc(&counter, sizeof(unsigned)));
  // Blocks of one multiprocessor each: resident together, so that waiting for one another is safe.
  std::printf("{\"multiprocessors\": %d", sms);
  for (int threads : {128, 256, 512}) {
    std::printf(", \"block_barrier_us_%d\": %.4f", threads, barrier_us(block_barrier_kernel, sms, threads, 1, false, counter));
    std::printf(", \"grid_sync_us_%d\": %.4f", threads, barrier_us(grid_barrier_kernel, sms, threads, 1, true, counter));
    std::printf(", \"counter_barrier_us_%d\": %.4f", threads,
                barrier_us(counter_barrier_kernel, sms, threads, 1, true, counter));
    for (int cluster : {2, 4, 8})
      std::printf(", \"cluster%d_barrier_us_%d\": %.4f", cluster, threads,
                  barrier_us(cluster_barrier_kernel, sms / cluster * cluster, threads, cluster, false, counter));
  }
  CHECK(cudaFuncSetAttribute(cluster_barrier_kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  std::printf(", \"cluster16_barrier_us_256\": %.4f}\n",
              barrier_us(cluster_barrier_kernel, sms / 16 * 16, 256, 16, false, counter));
  CHECK(cudaFree(counter));
  return 0;
}
