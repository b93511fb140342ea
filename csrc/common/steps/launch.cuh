// Launching a persistent kernel: as many clusters as run at a time, or as the caller wants.
#pragma once

#include <common/error.h>
#include <cuda_runtime.h>
#include <steps.h>

#include <common/launch.cuh>

namespace fastscore {

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
  config.blockDim = dim3(plan.threads);
  config.dynamicSmemBytes = plan.shared_bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  const int64_t samples = static_cast<int64_t>(plan.samples) * plan.cluster;
  const int64_t units = (parameters.batch + samples - 1) / samples * parameters.rows;
  if (clusters <= 0) {
    config.gridDim = dim3(plan.cluster);
    check(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config), "%s: how many clusters of %d run at a time", name,
          plan.cluster);
  }
  parameters.clusters = static_cast<int32_t>(units < clusters ? units : clusters);
  if (parameters.clusters < 1) {
    check(cudaErrorInvalidConfiguration, "%s: no cluster of %d blocks with %d bytes of shared memory each", name,
          plan.cluster, shared_bytes);
  }
  config.gridDim = dim3(parameters.clusters * plan.cluster);
  check(cudaLaunchKernelEx(&config, kernel, parameters), "%s: grid %d, cluster %d, %d threads, %d bytes shared", name,
        parameters.clusters * plan.cluster, plan.cluster, plan.threads, shared_bytes);
}

}  // namespace fastscore
