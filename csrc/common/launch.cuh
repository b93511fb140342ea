// Launching a kernel of a plan, and which of them a compilation holds.
#pragma once

#include <common/error.h>
#include <cuda_runtime.h>
#include <density_mlp.h>

// wgmma exists on sm_90a alone: neither other architectures nor PTX for later ones get its kernels' bodies.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FASTSCORE_HAS_WGMMA 1
#else
#define FASTSCORE_HAS_WGMMA 0
#endif

namespace fastscore {

// A launch's configuration, with the attribute that it points to.
struct LaunchConfig {
  cudaLaunchAttribute cluster = {};
  cudaLaunchConfig_t config = {};

  LaunchConfig(const Plan& plan, int tiles, int splits, cudaStream_t stream) {
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = plan.cluster;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    config.gridDim = dim3(tiles, splits);
    config.blockDim = dim3(plan.threads);
    config.dynamicSmemBytes = plan.shared_bytes;
    config.stream = stream;
    config.attrs = &cluster;
    config.numAttrs = plan.wgmma ? 1 : 0;
  }
  LaunchConfig(const LaunchConfig&) = delete;
};

template <class Kernel>
void allow_shared_memory(const char* name, Kernel* kernel, const Plan& plan) {
  const int bytes = static_cast<int>(plan.shared_bytes);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
        "%s: %d bytes of shared memory a block", name, bytes);
}

template <class Kernel>
void launch(const char* name, Kernel* kernel, const DensityMlp& parameters, const Plan& plan, int tiles, int splits,
            cudaStream_t stream) {
  allow_shared_memory(name, kernel, plan);
  const LaunchConfig launch(plan, tiles, splits, stream);
  check(cudaLaunchKernelEx(&launch.config, kernel, parameters),
        "%s: grid (%d, %d), cluster %d, %d threads, %d bytes shared", name, tiles, splits, plan.cluster, plan.threads,
        static_cast<int>(plan.shared_bytes));
}

// How many clusters of `plan.cluster` blocks the current device runs at once.
template <class Kernel>
int active_clusters(const char* name, Kernel* kernel, const Plan& plan) {
  allow_shared_memory(name, kernel, plan);
  const LaunchConfig launch(plan, plan.cluster, 1, nullptr);
  int clusters = 0;
  if (launch.config.numAttrs > 0) {
    check(cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch.config), "%s: how many clusters of %d fit", name,
          plan.cluster);
    return clusters;
  }
  int device = 0, multiprocessors = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "multiprocessors");
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&clusters, kernel, plan.threads, plan.shared_bytes),
        "%s: how many blocks a multiprocessor runs", name);
  return clusters * multiprocessors;
}

}  // namespace fastscore
