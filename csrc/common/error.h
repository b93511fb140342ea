// One way to report a failed CUDA call: what was tried, with which values, and CUDA's own words.
#pragma once

#include <cuda_runtime.h>

#include <cstdarg>
#include <cstdio>
#include <stdexcept>
#include <string>

namespace fastscore {

// Throw std::runtime_error unless `status` is a success. The rest is printf's and should name every value that could
// be to blame: check(cudaGetLastError(), "a_kernel: %d blocks of %d threads", blocks, threads).
[[gnu::format(printf, 2, 3)]] inline void check(cudaError_t status, const char* format, ...) {
  if (status == cudaSuccess) return;
  char what[512];
  va_list values;
  va_start(values, format);
  std::vsnprintf(what, sizeof what, format, values);
  va_end(values);
  // CUDA keeps the error of a failed launch and would report it again, for the next kernel.
  cudaGetLastError();
  throw std::runtime_error(std::string(what) + " failed: " + cudaGetErrorString(status) + " (" +
                           cudaGetErrorName(status) + ")");
}

}  // namespace fastscore
