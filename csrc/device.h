// Which GPUs there are, and whether this binary's kernels can run on them. Nothing here runs when the module loads.
#pragma once

#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace fastscore {

// Facts in the order in which they are shown: name, value.
using Facts = std::vector<std::pair<std::string, std::string>>;

Facts build_info();  // of this binary; asks no driver
Facts runtime();     // the driver, and of every GPU its name and whether kernels can run on it

// The reason why kernels cannot run on a device, or nothing. Does not throw.
std::optional<std::string> why_not(int device);

// What a device grants: compute capability (90 for 9.0), shared memory of a block, multiprocessors.
struct Limits {
  int capability, shared_bytes, multiprocessors;
};
Limits limits(int device);

// Makes a device current, and the one before it again when the scope ends.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int device_, before_ = 0;
};

}  // namespace fastscore
