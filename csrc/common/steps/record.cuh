// A row's record in shared memory, as one thread reads it (steps.h says what it holds).
#pragma once

#include <cuda_runtime.h>
#include <steps.h>

#include <ptx/shared.cuh>

namespace fastscore {

// x_t = alpha x + sigma eps; c^2 (a eps + b x - prediction)^2.
struct Coefficients {
  float alpha, sigma, a, b;
};

struct Record {
  uint32_t address;
  uint32_t column;  // bytes to the first of the thread's four columns in 16

  __device__ __forceinline__ Coefficients coefficients() const {
    const float4 v = ptx::load_shared<float4>(address);
    return {v.x, v.y, v.z, v.w};
  }
  __device__ __forceinline__ float weight() const { return ptx::load_shared<float>(address + 16); }

  // P of the thread's columns of group q.
  __device__ __forceinline__ uint4 points(int q) const {
    return ptx::load_shared<uint4>(address + column + 4 * kRecordHead + 64 * q);
  }

  // The thread's columns of group q of the vector that starts at column `at`. All rows of the tile read the same: the
  // eight lanes of a quarter of the warp touch 64 bytes, so no two of them meet in a bank.
  __device__ __forceinline__ float4 vector(int at, int q) const {
    return ptx::load_shared<float4>(address + column + 4 * at + 64 * q);
  }
};

}  // namespace fastscore
