// The smallest kernel: fills memory with one value, which shows that a binary's kernels reach a GPU.
#pragma once

#include <cstdint>

typedef struct CUstream_st* cudaStream_t;

namespace fastscore {

void fill(float* out, int64_t count, float value, cudaStream_t stream);

}  // namespace fastscore
