#include <common/error.h>
#include <cuda_runtime.h>
#include <probe.h>

namespace fastscore {
namespace {

constexpr int kThreads = 256;

__global__ void fill_kernel(float* out, int64_t count, float value) {
  int64_t i = int64_t{kThreads} * blockIdx.x + threadIdx.x;
  if (i < count) out[i] = value;
}

}  // namespace

void fill(float* out, int64_t count, float value, cudaStream_t stream) {
  int blocks = static_cast<int>((count + kThreads - 1) / kThreads);
  if (blocks == 0) return;
  fill_kernel<<<blocks, kThreads, 0, stream>>>(out, count, value);
  check(cudaGetLastError(), "fill_kernel: %d blocks of %d threads, %lld values", blocks, kThreads,
        static_cast<long long>(count));
}

}  // namespace fastscore
