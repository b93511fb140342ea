// Launching a micro-kernel as the library launches its own (csrc/common/launch.cuh), for callers that read an error's text.
#pragma once

#include <cuda_runtime.h>
#include <density_mlp.h>

#include <common/launch.cuh>
#include <exception>
#include <string>

namespace fastscore {

// Launch clusters of `plan.cluster` blocks: `blocks` of them, or as many as run at once where that is 0. Returns how many.
template <class... Parameters, class... Arguments>
int launch_micro(const char* name, void (*kernel)(Parameters...), const Plan& plan, int blocks, cudaStream_t stream,
                 Arguments... arguments) {
  if (blocks == 0) blocks = plan.cluster * active_clusters(name, kernel, plan);
  allow_shared_memory(name, kernel, plan);
  const LaunchConfig launch(plan, blocks, 1, stream);
  check(cudaLaunchKernelEx(&launch.config, kernel, arguments...), "%s: %d blocks in clusters of %d, %d bytes shared",
        name, blocks, plan.cluster, static_cast<int>(plan.shared_bytes));
  return blocks;
}

// The text of what `run` throws, or an empty one.
template <class Run>
const char* guarded(Run&& run) {
  static thread_local std::string message;
  message.clear();
  try {
    run();
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}

template <class T>
T* pointer(uint64_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace fastscore
