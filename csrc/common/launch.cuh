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

template <class Kernel>
void launch(const char* name, Kernel* kernel, const DensityMlp& parameters, const Plan& plan, int tiles, int splits,
            cudaStream_t stream) {
  const int shared_bytes = static_cast<int>(plan.shared_bytes);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
        "%s: %d bytes of shared memory a block", name, shared_bytes);
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = plan.cluster;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(tiles, splits);
  config.blockDim = dim3(plan.threads);
  config.dynamicSmemBytes = plan.shared_bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = plan.wgmma ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, parameters), "%s: grid (%d, %d), cluster %d, %d threads, %d bytes shared",
        name, tiles, splits, plan.cluster, plan.threads, shared_bytes);
}

}  // namespace fastscore
