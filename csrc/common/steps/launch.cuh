// Launching a persistent kernel: as many clusters as run at a time, or as the caller wants.
#pragma once

#include <common/error.h>
#include <cuda_runtime.h>
#include <steps.h>

#include <algorithm>
#include <common/launch.cuh>
#include <map>
#include <mutex>
#include <tuple>

namespace fastscore {

// How many clusters the current device runs at once. Asking costs more than a launch, so every kernel, of which a size of
// a cluster is a part, asks once for each device and size of shared memory.
template <class Kernel>
int clusters_at_once(const char* name, Kernel* kernel, const cudaLaunchConfig_t& config) {
  static std::mutex mutex;
  static std::map<std::tuple<Kernel*, int, size_t>, int> known;
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard<std::mutex> lock(mutex);
  int& found = known[{kernel, device, config.dynamicSmemBytes}];
  if (found == 0) {
    check(cudaOccupancyMaxActiveClusters(&found, kernel, &config), "%s: how many clusters run at a time", name);
  }
  return found;
}

template <class Kernel>
void launch_persistent(const char* name, Kernel* kernel, Steps parameters, const StepsPlan& plan, int clusters,
                       cudaStream_t stream) {
  const int shared_bytes = static_cast<int>(plan.shared_bytes);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
        "%s: %d bytes of shared memory a block", name, shared_bytes);
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = plan.cluster;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(plan.cluster);
  config.blockDim = dim3(plan.threads);
  config.dynamicSmemBytes = plan.shared_bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  const int64_t samples = static_cast<int64_t>(plan.samples) * plan.cluster;
  const int64_t units = (parameters.batch + samples - 1) / samples * parameters.rows;
  if (clusters <= 0) clusters = std::max(1, clusters_at_once(name, kernel, config));
  parameters.clusters = static_cast<int32_t>(std::min<int64_t>(units, clusters));
  const int blocks = parameters.clusters * plan.cluster;
  config.gridDim = dim3(blocks);
  check(cudaLaunchKernelEx(&config, kernel, parameters), "%s: grid %d, cluster %d, %d threads, %d bytes shared", name,
        blocks, plan.cluster, plan.threads, shared_bytes);
}

}  // namespace fastscore
