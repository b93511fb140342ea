// Launching a persistent kernel: as many clusters as run at a time, or as the caller wants.
#pragma once

#include <common/error.h>
#include <cuda_runtime.h>
#include <steps.h>

#include <algorithm>
#include <common/launch.cuh>
#include <cstdint>
#include <map>
#include <mutex>
#include <tuple>
#include <type_traits>

namespace fastscore {

// How many clusters of so many blocks the current device runs at once. Asking costs more than a launch, so it is asked
// once for each device, kernel and size.
template <class Kernel>
int clusters_at_once(const char* name, Kernel* kernel, int blocks, const cudaLaunchConfig_t& config) {
  static std::mutex mutex;
  static std::map<std::tuple<Kernel*, int, int, size_t>, int> known;
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard<std::mutex> lock(mutex);
  int& found = known[{kernel, device, blocks, config.dynamicSmemBytes}];
  if (found == 0) {
    check(cudaOccupancyMaxActiveClusters(&found, kernel, &config), "%s: how many clusters of %d run at a time", name,
          blocks);
  }
  return found;
}

// Call launch(data, padded, kept) with what a plan says as constants. Where keys and x may be kept, those of 16 dimensions
// always are.
template <bool MayKeep, class Launch>
void for_variant(const StepsPlan& plan, Launch&& launch) {
  using Few = std::integral_constant<int, 16>;
  using Many = std::integral_constant<int, 64>;
  using Kept = std::bool_constant<MayKeep>;
  const auto with = [&](auto data, auto kept) {
    if (plan.padded) {
      launch(data, std::true_type{}, kept);
    } else {
      launch(data, std::false_type{}, kept);
    }
  };
  if (plan.data == 16) return with(Few{}, Kept{});
  if (plan.kept) return with(Many{}, Kept{});
  with(Many{}, std::false_type{});
}

template <class Kernel>
void launch_persistent(const char* name, Kernel* kernel, Steps parameters, const StepsPlan& plan, StepsConfig config,
                       cudaStream_t stream) {
  const int shared_bytes = static_cast<int>(plan.shared_bytes);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
        "%s: %d bytes of shared memory a block", name, shared_bytes);
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t launch = {};
  launch.blockDim = dim3(plan.threads);
  launch.dynamicSmemBytes = plan.shared_bytes;
  launch.stream = stream;
  launch.attrs = &cluster;
  launch.numAttrs = 1;
  int blocks = 0, at_once = 0;
  for (;; config.cluster /= 2) {  // a device may run no cluster of that size
    blocks = config.cluster * plan.parts;
    cluster.val.clusterDim.x = blocks;
    launch.gridDim = dim3(blocks);
    at_once = config.clusters > 0 ? config.clusters : clusters_at_once(name, kernel, blocks, launch);
    if (at_once > 0 || config.cluster == 1) break;
  }
  const int64_t samples = static_cast<int64_t>(plan.samples) * config.cluster;
  const int64_t units = (parameters.batch + samples - 1) / samples * parameters.rows;
  const auto sharing = static_cast<uint32_t>(std::min<int64_t>(units, std::max(1, at_once)));
  check(units > INT32_MAX ? cudaErrorInvalidValue : cudaSuccess, "%s: %lld pairs of a tile and a row", name,
        static_cast<long long>(units));
  parameters.units_each = static_cast<uint32_t>(units) / sharing;
  parameters.units_left = static_cast<uint32_t>(units) % sharing;
  launch.gridDim = dim3(blocks, sharing);
  check(cudaLaunchKernelEx(&launch, kernel, parameters), "%s: %u clusters of %d, %d threads, %d bytes shared", name,
        sharing, blocks, plan.threads, shared_bytes);
}

}  // namespace fastscore
