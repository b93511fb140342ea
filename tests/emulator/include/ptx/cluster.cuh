// Clusters: all CTAs of one run at the same time.
#pragma once
#include <cuda_runtime.h>

namespace fastscore::ptx {

inline uint32_t cluster_rank() { return emulator::current_thread().block->rank; }

inline uint32_t cluster_size() { return static_cast<uint32_t>(emulator::machine.blocks.size()); }

inline void cluster_sync() {
  emulator::require_capability("cluster_sync", 9);
  emulator::meet(emulator::machine.cluster_barrier, static_cast<int>(emulator::machine.threads.size()), "cluster_sync");
}

}  // namespace fastscore::ptx
