// Stands in for CUDA's header of this name, so that kernels and the code that launches them compile for a CPU.
// Host and device code are one pass here, with the feature macros of sm_90a.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <utility>

#include "emulator/collective.h"
#include "emulator/launch.h"

#define __CUDA_ARCH__ 900
#define __CUDA_ARCH_FEAT_SM90_ALL 1
#define FASTSCORE_EMULATOR 1  // kernels of other architectures have bodies too
#define __device__
#define __host__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)
#define __restrict__ __restrict

// Functions that CUDA makes available in device code.

template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}
template <class T>
T __ldg(const T* pointer) {
  return *pointer;
}
inline uint32_t __float_as_uint(float value) { return std::bit_cast<uint32_t>(value); }
inline float __uint_as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>(uint64_t{a} * b >> 32); }
inline int __popc(uint32_t bits) { return std::popcount(bits); }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }

inline void __syncthreads() { fastscore::emulator::meet_named(0, static_cast<int>(blockDim.x), "__syncthreads"); }

inline void __syncwarp(uint32_t mask = ~0u) {
  int nothing = 0;
  fastscore::emulator::warp_collective("__syncwarp", mask, nothing, [](auto&) {});
}

namespace fastscore::emulator {

// Every lane gets the value of the lane source(lane).
template <class T, class Source>
T shuffle(const char* name, uint32_t mask, T value, Source source) {
  static_assert(sizeof(T) <= 8);
  struct {
    T in, out;
    int source;
  } payload{value, value, source(current_thread().lane)};
  warp_collective(name, mask, payload, [&](auto& lanes) {
    for (int lane = 0; lane < kWarpSize; lane++) {
      if (!(mask >> lane & 1)) continue;
      int from = lanes[lane]->source;
      if (!(mask >> from & 1)) fail("%s: lane %d reads lane %d, which is not in the mask 0x%x", name, lane, from, mask);
      lanes[lane]->out = lanes[from]->in;
    }
  });
  return payload.out;
}

}  // namespace fastscore::emulator

template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int other) {
  return fastscore::emulator::shuffle("__shfl_xor_sync", mask, value, [=](int lane) { return lane ^ (other & 31); });
}
template <class T>
T __shfl_sync(uint32_t mask, T value, int source) {
  return fastscore::emulator::shuffle("__shfl_sync", mask, value, [=](int) { return source & 31; });
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta) {
  return fastscore::emulator::shuffle("__shfl_down_sync", mask, value,
                                      [=](int lane) { return lane + delta < 32 ? int(lane + delta) : lane; });
}
template <class T>
T atomicAdd(T* address, T value) {
  T old = *address;
  *address += value;
  return old;
}

// The runtime functions of the host.

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719
};
struct CUstream_st;
using cudaStream_t = CUstream_st*;
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
  cudaFuncAttributeNonPortableClusterSizeAllowed = 13
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
union cudaLaunchAttributeValue {
  struct {
    unsigned x, y, z;
  } clusterDim;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

namespace fastscore::emulator {
inline cudaError_t last_error = cudaSuccess;
inline std::mutex one_launch;  // there is one machine
}  // namespace fastscore::emulator

inline const char* cudaGetErrorName(cudaError_t) { return "emulated"; }
inline const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaSuccess) return "no error";
  if (error == cudaErrorInvalidValue) return "invalid argument";
  return error == cudaErrorInvalidConfiguration ? "invalid configuration argument" : "unspecified launch failure";
}
inline cudaError_t cudaPeekAtLastError() { return fastscore::emulator::last_error; }
inline cudaError_t cudaGetLastError() { return std::exchange(fastscore::emulator::last_error, cudaSuccess); }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int /*device*/) {
  const auto& machine = fastscore::emulator::machine;
  if (attribute == cudaDevAttrComputeCapabilityMajor) *value = machine.major;
  if (attribute == cudaDevAttrComputeCapabilityMinor) *value = machine.minor;
  if (attribute == cudaDevAttrMultiProcessorCount) *value = machine.multiprocessors;
  if (attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin) *value = fastscore::emulator::kSharedMaximum;
  return cudaSuccess;
}

template <class T>
cudaError_t cudaFuncSetAttribute(T* kernel, cudaFuncAttribute attribute, int value) {
  using namespace fastscore::emulator;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || static_cast<size_t>(value) > kSharedMaximum) return last_error = cudaErrorInvalidValue;
  machine.shared_limit[reinterpret_cast<const void*>(kernel)] = value;
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  using namespace fastscore::emulator;
  std::lock_guard lock(one_launch);
  machine.error.clear();
  Configuration configuration{config->gridDim, config->blockDim, dim3(), config->dynamicSmemBytes};
  for (unsigned i = 0; i < config->numAttrs; i++)
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) {
      const auto& cluster = config->attrs[i].val.clusterDim;
      configuration.cluster = dim3(cluster.x, cluster.y, cluster.z);
    }
  const void* address = reinterpret_cast<const void*>(kernel);
  auto limit = machine.shared_limit.find(address);
  machine.error = launch_error(configuration, limit == machine.shared_limit.end() ? kSharedDefault : limit->second);
  if (!machine.error.empty()) return last_error = cudaErrorInvalidConfiguration;
  std::tuple<std::decay_t<Parameters>...> values(std::forward<Arguments>(arguments)...);
  bool right = run_grid(address, configuration, [&] { std::apply(kernel, values); });
  return right ? cudaSuccess : last_error = cudaErrorLaunchFailure;
}

// One block a multiprocessor, and of a machine that is not a multiple of a cluster the rest stays idle.
template <class T>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, T*, const cudaLaunchConfig_t* config) {
  *clusters = fastscore::emulator::machine.multiprocessors / static_cast<int>(config->attrs[0].val.clusterDim.x);
  return cudaSuccess;
}
template <class T>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, T*, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}

// What tests call: the order of threads and copies, the device, and what was wrong with the last launch.
#define FASTSCORE_EXPORT extern "C" inline __attribute__((used, visibility("default")))
FASTSCORE_EXPORT void emulator_seed(uint64_t seed, int schedule) {
  fastscore::emulator::machine.random_state = seed * 2 + 1;
  fastscore::emulator::machine.schedule = static_cast<fastscore::emulator::Schedule>(schedule);
}
FASTSCORE_EXPORT void emulator_device(int major, int minor, int multiprocessors) {
  auto& machine = fastscore::emulator::machine;
  machine.major = major, machine.minor = minor, machine.multiprocessors = multiprocessors;
}
FASTSCORE_EXPORT const char* emulator_error() { return fastscore::emulator::machine.error.c_str(); }
#undef FASTSCORE_EXPORT
