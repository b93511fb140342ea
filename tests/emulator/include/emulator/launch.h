// Launching a kernel: the rules of the configuration, then one cluster after the other.
#pragma once
#include <cxxabi.h>
#include <dlfcn.h>

#include <cstdlib>
#include <memory>
#include <mutex>

#include "memory.h"

namespace fastscore::emulator {

struct Configuration {
  dim3 grid, block, cluster;
  size_t shared_bytes = 0;
};

// Name and template arguments of a kernel, as far as the library exports them.
inline std::string kernel_name(const void* kernel) {
  Dl_info info;
  if (!dladdr(kernel, &info) || !info.dli_sname) return "kernel";
  int status = 0;
  std::unique_ptr<char, void (*)(void*)> demangled(abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status),
                                                   free);
  std::string name = status == 0 ? demangled.get() : info.dli_sname;
  size_t arguments = name.rfind(">(");
  name.resize(arguments == std::string::npos ? std::min(name.find('('), name.size()) : arguments + 1);
  return name.starts_with("void ") ? name.substr(5) : name;
}

// The first and last frame of every thread.
inline void thread_main() {
  try {
    machine.kernel();
    Thread& thread = current_thread();
    const WgmmaQueue& queue = thread.block->warpgroups[thread.id / kWarpgroupSize].wgmma;
    if (thread.wgmma.issued > queue.operations_done) fail("the kernel ends before wgmma_wait");
  } catch (const Violation& violation) {
    machine.error = violation.message;
  } catch (const std::exception& exception) {
    machine.error = exception.what();
  }
  Thread& thread = current_thread();
  thread.finished = true;
  thread.warp->ready &= ~(1u << thread.lane);
  thread.block->running--;
  enter_scheduler(thread);
}

// A cluster before its first instruction: shared memory poisoned, every thread at the start of the kernel.
inline void reset_cluster(const Configuration& configuration, uint3 first, uint8_t* memory, size_t stride) {
  int cluster = configuration.cluster.x, threads = configuration.block.x, warps = threads / kWarpSize;
  machine.current = nullptr;
  machine.in_flight.clear();
  machine.cluster_barrier = {};
  machine.step = 0;
  machine.blocks.assign(cluster, {});
  machine.warps.assign(cluster * warps, {});
  machine.threads.assign(cluster * threads, {});
  for (int rank = 0; rank < cluster; rank++) {
    Block& block = machine.blocks[rank];
    block.index = {first.x + rank, first.y, first.z};
    block.rank = rank;
    block.running = threads;
    block.memory = memory + rank * stride;
    block.memory_bytes = static_cast<uint32_t>(configuration.shared_bytes);
    memset(block.memory, kPoison, stride);
    block.written.assign(stride / 4, kClean);
    block.warpgroups.resize((warps + 3) / 4);
    for (int w = 0; w < warps; w++) {
      Warp& warp = machine.warps[rank * warps + w];
      warp.block = &block;
      warp.index = w;
      warp.threads = &machine.threads[rank * threads + w * kWarpSize];
    }
    for (int t = 0; t < threads; t++) {
      Thread& thread = machine.threads[rank * threads + t];
      thread.block = &block;
      thread.warp = &machine.warps[rank * warps + t / kWarpSize];
      thread.index = {static_cast<unsigned>(t), 0, 0};
      thread.id = t;
      thread.slot = rank * threads + t;
      thread.lane = t % kWarpSize;
      create_context(thread.context, machine.stacks.stack(thread.slot), Stacks::kBytes, thread_main);
    }
  }
}

// What is wrong with a launch, or an empty text.
inline std::string launch_error(const Configuration& c, size_t shared_limit) {
  auto text = [](const dim3& d) {
    return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
  };
  if (c.grid.x * c.grid.y * c.grid.z == 0 || c.grid.y > 65535 || c.grid.z > 65535)
    return "invalid grid " + text(c.grid);
  if (c.block.y != 1 || c.block.z != 1 || c.block.x == 0 || c.block.x > 1024 || c.block.x % kWarpSize != 0)
    return "the emulator takes up to 1024 threads, whole warps along x, not " + text(c.block);
  if (c.cluster.y != 1 || c.cluster.z != 1 || c.cluster.x == 0 || c.cluster.x > 16)
    return "the emulator takes clusters of 1 to 16 CTAs along x, not " + text(c.cluster);
  if (c.cluster.x > 1 && machine.major < 9) return "clusters need compute capability 9.0";
  if (static_cast<int>(c.cluster.x) > machine.multiprocessors)
    return std::to_string(machine.multiprocessors) + " multiprocessors run no cluster of " +
           std::to_string(c.cluster.x);
  if (c.grid.x % c.cluster.x != 0)
    return "the cluster " + text(c.cluster) + " does not divide the grid " + text(c.grid);
  if (c.shared_bytes > kSharedMaximum)
    return std::to_string(c.shared_bytes) + " bytes of shared memory are more than an SM has for a CTA";
  if (c.shared_bytes > shared_limit)
    return std::to_string(c.shared_bytes) + " bytes of shared memory are more than the " +
           std::to_string(shared_limit) + " that cudaFuncSetAttribute allowed";
  return "";
}

// Runs the kernel for the whole grid; false if a thread broke a rule, then machine.error says which.
inline bool run_grid(const void* kernel, const Configuration& configuration, std::function<void()> body) {
  gridDim = configuration.grid, blockDim = configuration.block;
  size_t stride = (configuration.shared_bytes + 2047) / 1024 * 1024;
  unsigned cluster = configuration.cluster.x;
  std::unique_ptr<uint8_t, void (*)(void*)> memory(static_cast<uint8_t*>(std::aligned_alloc(1024, cluster * stride)),
                                                   free);
  machine.kernel = std::move(body);
  machine.stacks.reserve(cluster * configuration.block.x);
  try {
    for (unsigned z = 0; z < configuration.grid.z && machine.error.empty(); z++)
      for (unsigned y = 0; y < configuration.grid.y && machine.error.empty(); y++)
        for (unsigned x = 0; x < configuration.grid.x && machine.error.empty(); x += cluster) {
          reset_cluster(configuration, {x, y, z}, memory.get(), stride);
          run_cluster();
        }
  } catch (const Violation& violation) {
    machine.error = violation.message;
  }
  machine.current = nullptr;
  machine.kernel = nullptr;
  if (!machine.error.empty()) machine.error = kernel_name(kernel) + ": " + machine.error;
  return machine.error.empty();
}

}  // namespace fastscore::emulator
