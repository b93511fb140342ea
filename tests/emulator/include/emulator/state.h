// What an emulated GPU knows: one cluster of CTAs with all their threads, and the work in flight.
#pragma once
#include <array>
#include <cstdint>
#include <deque>
#include <functional>
#include <string>
#include <unordered_map>
#include <vector>

#include "fiber.h"
#include "vector_types.h"
#include "wgmma_queue.h"

namespace fastscore::emulator {

constexpr int kWarpSize = 32, kWarpgroupSize = 128;
constexpr uint32_t kSharedBase = 1024;              // as on sm_90, the first kilobyte of the window is reserved
constexpr size_t kSharedDefault = 48 << 10;         // dynamic shared memory that needs no attribute
constexpr size_t kSharedMaximum = 227 << 10;        // dynamic shared memory of one CTA on sm_90
constexpr uint8_t kPoison = 0xff;                   // memory nobody wrote: a NaN in every float format
constexpr uint16_t kClean = 0, kMbarrier = 0xffff;  // values of Block::written that are not a writer

struct Block;
struct Warp;

// A copy of cp.async that has not been made yet.
struct ThreadCopy {
  uint32_t dst;
  const void* src;
};

struct Thread {
  Context context;
  Block* block = nullptr;
  Warp* warp = nullptr;
  uint3 index{};
  int id = 0;    // in the block
  int slot = 0;  // in the cluster: its stack
  int lane = 0;
  bool finished = false;

  // What it waits for, to report a deadlock: an operation and its two operands.
  const char* waiting_for = nullptr;
  uint32_t operands[2] = {0, 0};

  WgmmaProgress wgmma;
  std::vector<uint32_t> unfenced;                  // addresses it wrote since its last fence.proxy.async
  std::deque<std::vector<ThreadCopy>> copies{{}};  // groups of cp.async; the last is not committed
};

// A rendezvous of the lanes of a warp: the last to arrive works for all.
struct Collective {
  const char* name = nullptr;
  uint32_t mask = 0, arrived = 0;
  std::array<void*, kWarpSize> payload{};
};

struct Warp {
  Block* block = nullptr;
  Thread* threads = nullptr;
  int index = 0;               // in the block
  uint32_t ready = ~0u;        // lanes that can run
  uint64_t stalled_until = 0;  // the adversary does not run it before this step
  Collective collective;
};

// A barrier for a number of threads: bar.sync, cluster_sync, setmaxnreg.
struct Barrier {
  int expected = 0, arrived = 0;
  std::vector<Thread*> waiting;
};

struct Mbarrier {
  uint32_t count = 0;    // arrivals a phase takes
  uint32_t pending = 0;  // arrivals still missing in this phase
  int64_t bytes = 0;     // bytes expected minus bytes delivered in this phase
  uint32_t phase = 0;    // parity of the current, incomplete phase
  std::vector<Thread*> waiting;
};

struct Warpgroup {
  WgmmaQueue wgmma;
  Barrier registers;
  int register_count = 0;
};

struct Block {
  uint3 index{};
  uint32_t rank = 0;
  int running = 0;  // threads that have not returned
  uint8_t* memory = nullptr;
  uint32_t memory_bytes = 0;
  std::vector<uint16_t> written;  // of every 4 bytes: kClean, kMbarrier, or 1 + the thread whose store is not fenced
  std::unordered_map<uint32_t, Mbarrier> mbarriers;
  std::array<Barrier, 16> barriers;
  std::vector<Warpgroup> warpgroups;
};

// Work that the hardware does at a time of its own choice, for a thread that issued it.
struct InFlight {
  Thread* issuer;
  const char* name;
  bool from_global_memory;
  bool patient;  // not before nothing else can go on
  std::function<void()> perform;
};

enum class Schedule { in_order = 0, random = 1, adversarial = 2 };

struct Machine {
  // The device.
  int major = 9, minor = 0, multiprocessors = 132;
  std::unordered_map<const void*, size_t> shared_limit;  // of kernels whose attribute was set

  // The cluster that runs.
  std::vector<Block> blocks;
  std::vector<Warp> warps;
  std::vector<Thread> threads;
  std::deque<InFlight> in_flight;
  Barrier cluster_barrier;
  std::function<void()> kernel;
  Stacks stacks;
  Context scheduler;
  Thread* current = nullptr;
  uint64_t step = 0;

  Schedule schedule = Schedule::in_order;
  uint64_t random_state = 0x9e3779b97f4a7c15;
  std::string error;  // of the last launch; empty if it was right
};

inline Machine machine;

}  // namespace fastscore::emulator

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
