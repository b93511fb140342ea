// fastscore._C: what Python sees of the kernels. Addresses, sizes and streams come as integers, so that nothing here
// knows of torch; fastscore/ops checks the tensors they come from.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "density_mlp.h"
#include "device.h"
#include "steps.h"

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
      "plan",
      [](int hidden, int data, int linears, int row_stride, int capability, int shared_limit) -> py::object {
        fastscore::Plan plan;
        const std::string reason = fastscore::plan(hidden, data, linears, row_stride, capability, shared_limit, &plan);
        if (!reason.empty()) return py::str(reason);
        py::dict result;
        result["samples"] = plan.samples, result["threads"] = plan.threads, result["tiles"] = plan.tiles;
        result["stages"] = plan.stages, result["stage_bytes"] = plan.stage_bytes;
        result["table_stages"] = plan.table_stages;
        result["cluster"] = plan.cluster, result["shared_bytes"] = plan.shared_bytes;
        return result;
      },
      py::arg("hidden"), py::arg("data"), py::arg("linears"), py::arg("row_stride"), py::arg("capability"),
      py::arg("shared_limit"),
      "Return how a kernel of these padded widths divides shared memory, or the reason why there is none.");
  m.def(
      "density_mlp",
      [](int hidden, int data, int linears, const std::vector<uint64_t>& pointers, const std::vector<int32_t>& sizes,
         const std::vector<int32_t>& operands, const std::string& program, int device, uintptr_t stream, int cluster,
         int splits) {
        fastscore::DeviceGuard guard(device);
        if (pointers.size() != 9 || sizes.size() != 5 || operands.size() != 8) {
          throw std::runtime_error("density_mlp takes 9 addresses, 5 sizes and 8 operands, got " +
                                   std::to_string(pointers.size()) + ", " + std::to_string(sizes.size()) + " and " +
                                   std::to_string(operands.size()));
        }
        const fastscore::Limits limits = fastscore::limits(device);
        fastscore::Plan plan;
        const std::string reason =
            fastscore::plan(hidden, data, linears, sizes[2], limits.capability, limits.shared_bytes, &plan);
        if (!reason.empty()) throw std::runtime_error("no compiled kernel runs this network: " + reason);
        fastscore::density_mlp(
            fastscore::arguments(pointers.data(), sizes.data(), operands.data(), program.data(), program.size()), plan,
            {cluster, splits}, pointer<CUstream_st>(stream));
      },
      py::arg("hidden"), py::arg("data"), py::arg("linears"), py::arg("pointers"), py::arg("sizes"),
      py::arg("operands"), py::arg("program").none(false), py::arg("device"), py::arg("stream"), py::arg("cluster") = 0,
      py::arg("splits") = 0, "Launch the fused kernel; fastscore/ops/cuda.py makes the arguments.");
  m.def(
      "steps_plan",
      [](int hidden, int data, bool padded, int linears, int record, int capability, int shared_limit) -> py::object {
        fastscore::StepsPlan plan;
        const std::string reason =
            fastscore::plan_steps(hidden, data, padded, linears, record, capability, shared_limit, &plan);
        if (!reason.empty()) return py::str(reason);
        py::dict result;
        result["samples"] = plan.samples, result["threads"] = plan.threads, result["tiles"] = plan.tiles;
        result["stages"] = plan.stages, result["stage_bytes"] = plan.stage_bytes;
        result["record_stages"] = plan.record_stages, result["kept"] = plan.kept;
        result["parts"] = plan.parts, result["cluster"] = plan.cluster, result["shared_bytes"] = plan.shared_bytes;
        return result;
      },
      py::arg("hidden"), py::arg("data"), py::arg("padded"), py::arg("linears"), py::arg("record"),
      py::arg("capability"), py::arg("shared_limit"),
      "Return how a kernel of steps divides shared memory, or the reason why there is none.");
  m.def(
      "steps",
      [](int hidden, int data, bool padded, int linears, int record, const std::vector<uint64_t>& pointers,
         const std::vector<int32_t>& sizes, const std::vector<int32_t>& columns, const std::string& steps, int device,
         uintptr_t stream, int cluster, int clusters, int shared_limit) {
        fastscore::DeviceGuard guard(device);
        if (pointers.size() != 5 || sizes.size() != 2 || columns.size() != 4) {
          throw std::runtime_error("steps takes 5 addresses, 2 sizes and 4 columns, got " +
                                   std::to_string(pointers.size()) + ", " + std::to_string(sizes.size()) + " and " +
                                   std::to_string(columns.size()));
        }
        const fastscore::Limits limits = fastscore::limits(device);
        fastscore::StepsPlan plan;
        const int granted = shared_limit > 0 ? std::min(shared_limit, limits.shared_bytes) : limits.shared_bytes;
        const std::string reason =
            fastscore::plan_steps(hidden, data, padded, linears, record, limits.capability, granted, &plan);
        if (!reason.empty()) throw std::runtime_error("no compiled kernel runs these steps: " + reason);
        const int32_t all[3] = {sizes[0], sizes[1], record};
        fastscore::launch_steps(
            fastscore::step_arguments(pointers.data(), all, columns.data(), steps.data(), steps.size()), plan,
            {cluster, clusters}, pointer<CUstream_st>(stream));
      },
      py::arg("hidden"), py::arg("data"), py::arg("padded"), py::arg("linears"), py::arg("record"), py::arg("pointers"),
      py::arg("sizes"), py::arg("columns"), py::arg("steps").none(false), py::arg("device"), py::arg("stream"),
      py::arg("cluster") = 0, py::arg("clusters") = 0, py::arg("shared_limit") = 0,
      "Launch the kernel of a program of steps; fastscore/ops/cuda_steps.py makes the arguments.");
}
