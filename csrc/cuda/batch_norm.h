// Launchers of batch_norm.cu, in plain C++ for the op layer. Each throws std::runtime_error where its launch fails.
// Parameters, statistics and running statistics come in any of these dtypes; null where there are none.
#pragma once
#include <cstdint>

namespace dlkern::cuda {

enum class NormType { float32, bfloat16, float16, float64 };

struct ChannelValues {
  const void* data;
  NormType type;
};
struct ChannelResults {
  void* data;
  NormType type;
};

// How threads are laid over the input. channels_last: [images * inner, channels]; contiguous: [images, channels,
// inner]. `channels` and `inner` are less than 2**31.
struct NormShape {
  int64_t images, channels, inner;
  bool channels_last;
};

// Chunks that a channel is split into: the size of the buffers of partial sums, [2, chunks, channels] doubles.
int64_t batch_norm_chunks(NormType type, const NormShape& shape);

struct NormStatistics {
  ChannelValues running_mean, running_var;
  double momentum, eps;
  float *mean, *invstd;
  ChannelResults new_mean, new_var;
};
// Mean and 1 / standard deviation of each channel, and new running statistics where there are old ones. Without
// elements the mean is 0, invstd 1, and running statistics stay.
void batch_norm_statistics(NormType type, const NormShape& shape, const void* input, double* partial,
                           const NormStatistics& statistics, void* stream);

// mean and invstd in float64 from running statistics.
void batch_norm_running(const ChannelValues& running_mean, const ChannelValues& running_var, double eps,
                        int64_t channels, double* mean, double* invstd, void* stream);

// output = activation((input - mean) * invstd * weight + bias + residual)
void batch_norm_apply(NormType type, const NormShape& shape, const void* input, const void* residual,
                      const ChannelValues& mean, const ChannelValues& invstd, const ChannelValues& weight,
                      const ChannelValues& bias, int activation, void* output, void* stream);

struct NormBackward {
  const void *grad_output, *input, *output;  // output: null without activation
  ChannelValues mean, invstd, weight;
  bool train;
  int activation;
  double* partial;      // [2, chunks, channels]
  float* coefficients;  // [2, channels]
  void *grad_input, *grad_residual;  // grad_residual may be null
  ChannelResults grad_weight, grad_bias;
};
void batch_norm_backward(NormType type, const NormShape& shape, const NormBackward& args, void* stream);

}  // namespace dlkern::cuda
