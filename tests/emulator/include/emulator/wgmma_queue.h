// The wgmma that a warpgroup has issued, and the accumulators they own until they are done.
#pragma once
#include <array>
#include <cstdint>
#include <deque>
#include <list>
#include <vector>

namespace fastscore::emulator {

// One 64 x n result in flight. The threads' registers hold NaN meanwhile; the value is here.
struct Accumulators {
  int n = 0;
  int pending = 0;                      // operations that still have to add to it
  std::vector<float> value;             // [64][n]
  std::array<float*, 128> registers{};  // of each thread; null before the thread issued the first operation
};

struct WgmmaOperation {
  int n = 0;
  bool a_in_registers = false, accumulate = false;
  uint64_t a_descriptor = 0, b_descriptor = 0;
  Accumulators* accumulators = nullptr;
  std::array<std::array<float, 16>, 64> a;  // registers are read when the instruction is issued
};

// Operations up to number `end`, committed together by `threads` threads so far.
struct WgmmaGroup {
  uint64_t end = 0;
  int threads = 0;
};

// Operations and groups are numbered from the start of the kernel; the deques hold those that are not done.
struct WgmmaQueue {
  std::deque<WgmmaOperation> operations;
  std::deque<WgmmaGroup> groups;
  uint64_t operations_done = 0, groups_done = 0;
  std::list<Accumulators> accumulators;
};

// How far one thread has come in the queue of its warpgroup.
struct WgmmaProgress {
  uint64_t issued = 0, committed = 0, groups = 0;
  bool fenced = false;  // wgmma_fence since the last wait
  bool waiting = false;
};

}  // namespace fastscore::emulator
