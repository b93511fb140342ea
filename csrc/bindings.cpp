// fastscore._C: what Python sees of the kernels. Addresses, sizes and streams come as integers, so that nothing here
// knows of torch; fastscore/backends checks the tensors they come from.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "device.h"
#include "probe.h"

namespace py = pybind11;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

py::dict dictionary(const fastscore::Facts& facts) {
  py::dict result;
  for (const auto& [name, value] : facts) result[py::str(name)] = value;
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CUDA kernels of fastscore: addresses, sizes, a device and a stream in, a launch out.";
  m.def(
      "build_info", [] { return dictionary(fastscore::build_info()); },
      "Return how this binary was built: the CUDA toolkit, the GPU architectures in it and the compilers.");
  m.def(
      "runtime", [] { return dictionary(fastscore::runtime()); },
      "Return the driver, and every GPU with its compute capability or the reason why there is none.");
  m.def("why_not", &fastscore::why_not, py::arg("device"),
        "Return the reason why kernels cannot run on the GPU of that index, or None.");
  m.def(
      "fill",
      [](uintptr_t out, int64_t count, float value, int device, uintptr_t stream) {
        fastscore::DeviceGuard guard(device);
        fastscore::fill(pointer<float>(out), count, value, pointer<CUstream_st>(stream));
      },
      py::arg("out"), py::arg("count"), py::arg("value"), py::arg("device"), py::arg("stream"),
      "Fill `count` floats at the address `out` with a value.");
}
