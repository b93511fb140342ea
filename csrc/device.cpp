#include "device.h"

#include <common/error.h>
#include <cuda_runtime.h>

namespace fastscore {
namespace {

constexpr int kOldest = 80;  // compute capability times ten: bf16 and asynchronous copies begin there

// 13000 -> "13.0"
std::string version(int number) { return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10); }

// The reason why there is no GPU at all, or nothing. The runtime is linked statically and needs a driver of its major
// version; an older one, or none, is only found out when it is asked.
std::optional<std::string> no_gpu() {
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return "no NVIDIA driver is installed";
  if (driver / 1000 < CUDART_VERSION / 1000) {
    return "the kernels need a driver of CUDA " + version(CUDART_VERSION / 1000 * 1000) +
           " (580 or newer), found one of CUDA " + version(driver) + "; update it or use backend='triton'";
  }
  int count = 0;
  cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaSuccess && count > 0) return std::nullopt;
  cudaGetLastError();
  return status == cudaSuccess ? "the driver shows no GPU" : cudaGetErrorString(status);
}

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute(%d, device %d)", name, device);
  return value;
}

int capability(int device) {
  return 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
         attribute(cudaDevAttrComputeCapabilityMinor, device);
}

// Which kernels a device of this compute capability runs; each is compiled for it, or from PTX for a later one.
std::string kernels_of(int capability) {
  if (capability == 90) return "can run, with wgmma: hidden widths up to 512, as steps up to 1,024";
  return std::string("can run, with mma.sync") + (capability > 90 ? " from PTX" : "") + ": hidden widths up to 128";
}

std::string dotted(int capability) { return std::to_string(capability / 10) + "." + std::to_string(capability % 10); }

}  // namespace

Facts build_info() {
  return {{"architectures", FASTSCORE_ARCHITECTURES},
          {"toolkit", "CUDA " + version(CUDART_VERSION)},
          {"nvcc", FASTSCORE_NVCC},
          {"C++ compiler", __VERSION__}};
}

Facts runtime() {
  int driver = 0, count = 0;
  cudaDriverGetVersion(&driver);
  Facts facts = {{"driver", driver == 0 ? "none" : "CUDA " + version(driver)}};
  if (auto reason = no_gpu()) {
    facts.emplace_back("kernels", "cannot run: " + *reason);
    return facts;
  }
  check(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
  for (int device = 0; device < count; ++device) {
    cudaDeviceProp properties;
    check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties(device %d)", device);
    auto reason = why_not(device);
    const int found = capability(device);
    facts.emplace_back("cuda:" + std::to_string(device), std::string(properties.name) + ", compute capability " +
                                                             dotted(found) + ": " +
                                                             (reason ? "cannot run: " + *reason : kernels_of(found)));
  }
  return facts;
}

std::optional<std::string> why_not(int device) try {
  if (auto reason = no_gpu()) return reason;
  int found = capability(device);
  if (found < kOldest) return "needs compute capability " + dotted(kOldest) + ", got " + dotted(found);
  return std::nullopt;
} catch (const std::exception& error) {
  return error.what();
}

DeviceGuard::DeviceGuard(int device) : device_(device) {
  check(cudaGetDevice(&before_), "cudaGetDevice");
  if (device_ != before_) check(cudaSetDevice(device_), "cudaSetDevice(%d)", device_);
}

DeviceGuard::~DeviceGuard() {
  if (device_ != before_) cudaSetDevice(before_);
}

Limits limits(int device) {
  auto ask = [device](cudaDeviceAttr attribute) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute: attribute %d of device %d",
          static_cast<int>(attribute), device);
    return value;
  };
  return {10 * ask(cudaDevAttrComputeCapabilityMajor) + ask(cudaDevAttrComputeCapabilityMinor),
          ask(cudaDevAttrMaxSharedMemoryPerBlockOptin), ask(cudaDevAttrMultiProcessorCount)};
}

}  // namespace fastscore
