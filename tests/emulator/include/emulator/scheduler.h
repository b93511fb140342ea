// Which thread runs next, when work in flight is done, and what happens when nothing can go on.
#pragma once
#include <algorithm>
#include <bit>
#include <cstdarg>
#include <cstdio>
#include <exception>
#include <map>
#include <tuple>

#include "state.h"

namespace fastscore::emulator {

// Thrown in a thread, or by the work it issued, that broke a rule of the hardware.
struct Violation {
  std::string message;
};

[[noreturn, gnu::format(printf, 1, 2)]] inline void fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  std::string message = text;
  if (const Thread* thread = machine.current) {
    const uint3& block = thread->block->index;
    snprintf(text, sizeof text, "block (%u, %u, %u), thread %d (warp %d, lane %d): ", block.x, block.y, block.z,
             thread->id, thread->id / kWarpSize, thread->lane);
    message = text + message;
  }
  throw Violation{message};
}

// Instructions that only some architectures have.
inline void require_capability(const char* instruction, int major, bool only = false) {
  if (machine.major < major || (only && machine.major != major))
    fail("%s needs compute capability %d%s, the device has %d.%d", instruction, major, only ? ".0" : " or later",
         machine.major, machine.minor);
}

inline uint64_t random_bits() {  // xorshift64*
  uint64_t& x = machine.random_state;
  x ^= x >> 12, x ^= x << 25, x ^= x >> 27;
  return (x * 0x2545f4914f6cdd1d) >> 16;
}
inline bool one_in(uint64_t n) { return random_bits() % n == 0; }

inline Thread& current_thread() { return *machine.current; }

inline void enter_scheduler(Thread& thread) { switch_context(thread.context, machine.scheduler); }

// Stops the running thread until wake(); the operands are for the report of a deadlock.
inline void block(const char* operation, uint32_t first = 0, uint32_t second = 0) {
  Thread& thread = current_thread();
  thread.waiting_for = operation;
  thread.operands[0] = first, thread.operands[1] = second;
  thread.warp->ready &= ~(1u << thread.lane);
  enter_scheduler(thread);
}

inline void wake(Thread& thread) { thread.warp->ready |= 1u << thread.lane; }

inline void wake_all(std::vector<Thread*>& waiting) {
  for (Thread* thread : waiting) wake(*thread);
  waiting.clear();
}

// A point where another thread may run first; the order of instructions of different warps is never given.
inline void preempt() {
  if (machine.schedule != Schedule::in_order && one_in(8)) enter_scheduler(current_thread());
}

// The adversary may keep work that is `slow` waiting until nothing else can go on.
inline void start_asynchronous(const char* name, bool from_global_memory, std::function<void()> perform,
                               bool slow = false) {
  const bool patient = slow && machine.schedule == Schedule::adversarial && one_in(2);
  machine.in_flight.push_back({machine.current, name, from_global_memory, patient, std::move(perform)});
}

inline void perform_asynchronous(size_t i) {
  InFlight work = std::move(machine.in_flight[i]);
  machine.in_flight.erase(machine.in_flight.begin() + i);
  machine.current = work.issuer;
  work.perform();
  machine.current = nullptr;
}

// Lets the hardware finish some work in flight: when it likes, or, if `must`, because nothing else can go on. In order,
// it is as late as it can be, and copies from global memory are last, so that who does not wait for them finds NaN.
inline bool progress(bool must) {
  size_t count = machine.in_flight.size();
  if (count == 0) return false;
  if (machine.schedule == Schedule::in_order) {
    if (!must) return false;
    size_t i = 0;
    while (i < count && machine.in_flight[i].from_global_memory) i++;
    perform_asynchronous(i % count);
    return true;
  }
  if (!must && !one_in(machine.schedule == Schedule::random ? 4 : 256)) return false;
  const size_t first = random_bits() % count;
  for (size_t i = 0; i < count; i++) {
    const size_t at = (first + i) % count;
    if (machine.in_flight[at].patient) continue;
    perform_asynchronous(at);
    return true;
  }
  if (must) perform_asynchronous(first);
  return must;
}

// The adversary keeps a warp, a warpgroup or a CTA from running for a long time.
inline void stall_somebody() {
  const Warp& victim = machine.warps[random_bits() % machine.warps.size()];
  uint64_t until = machine.step + random_bits() % 2000;
  int group = std::array{1, 4, 32}[random_bits() % 3];  // warps
  for (Warp& warp : machine.warps)
    if (warp.block == victim.block && warp.index / group == victim.index / group) warp.stalled_until = until;
}

// The next warp to run: in turn, or a random one that can run and is not stalled.
inline Warp* choose_warp() {
  static thread_local std::vector<Warp*> able, stalled;
  able.clear(), stalled.clear();
  if (machine.schedule == Schedule::in_order) {
    for (size_t i = 0; i < machine.warps.size(); i++) {
      Warp& warp = machine.warps[machine.step++ % machine.warps.size()];
      if (warp.ready) return &warp;
    }
    return nullptr;
  }
  machine.step++;
  if (machine.schedule == Schedule::adversarial && one_in(64)) stall_somebody();
  for (Warp& warp : machine.warps)
    if (warp.ready) (warp.stalled_until > machine.step ? stalled : able).push_back(&warp);
  if (able.empty()) {
    const auto& work = machine.in_flight;
    const bool any = std::any_of(work.begin(), work.end(), [](const InFlight& one) { return !one.patient; });
    if (stalled.empty() || (any && one_in(2))) return nullptr;
    able.swap(stalled);
  }
  return able[random_bits() % able.size()];
}

inline void run_thread(Thread& thread) {
  machine.current = &thread;
  threadIdx = thread.index, blockIdx = thread.block->index;
  switch_context(machine.scheduler, thread.context);
  if (machine.stacks.canary(thread.slot) != Stacks::kCanary) {
    machine.stacks.canary(thread.slot) = Stacks::kCanary;
    fail("stack overflow: the emulator gives a thread %zu KB", Stacks::kBytes >> 10);
  }
  machine.current = nullptr;
}

// Runs each lane that can until it waits; lanes of a warp need not run in order either.
inline void run_warp(Warp& warp) {
  uint32_t lanes = warp.ready;
  int first = machine.schedule == Schedule::in_order ? 0 : random_bits() % kWarpSize;
  for (lanes = std::rotr(lanes, first); lanes; lanes &= lanes - 1) {
    run_thread(warp.threads[(std::countr_zero(lanes) + first) % kWarpSize]);
    if (!machine.error.empty()) return;
  }
}

// Who waits for what when nobody can run and nothing is in flight.
inline std::string deadlock_report() {
  std::map<std::tuple<uint32_t, int, std::string>, int> lanes;
  for (const Thread& thread : machine.threads) {
    if (thread.finished) continue;
    char text[160];
    snprintf(text, sizeof text, "%s(0x%x, %u)", thread.waiting_for, thread.operands[0], thread.operands[1]);
    std::string what = text;
    const auto& mbarriers = thread.block->mbarriers;
    if (auto found = mbarriers.find(thread.operands[0]); found != mbarriers.end()) {
      const Mbarrier& mbarrier = found->second;
      snprintf(text, sizeof text, ", which misses %u of %u arrivals and %lld bytes of phase %u", mbarrier.pending,
               mbarrier.count, static_cast<long long>(mbarrier.bytes), mbarrier.phase);
      what += text;
    }
    lanes[{thread.block->rank, thread.warp->index, what}]++;
  }
  const uint3& first = machine.blocks[0].index;
  std::string report = "deadlock in the cluster of block (" + std::to_string(first.x) + ", " + std::to_string(first.y) +
                       ", " + std::to_string(first.z) + "):";
  for (const auto& [where, count] : lanes)
    report += "\n  CTA " + std::to_string(std::get<0>(where)) + ", warp " + std::to_string(std::get<1>(where)) + ": " +
              std::to_string(count) + " lanes in " + std::get<2>(where);
  return report;
}

// Runs the threads of machine.threads until all have returned or one broke a rule.
inline void run_cluster() {
  size_t running = machine.threads.size();
  if (machine.schedule == Schedule::adversarial) stall_somebody();
  while (running > 0) {
    progress(false);
    if (Warp* warp = choose_warp()) {
      run_warp(*warp);
      if (!machine.error.empty()) return;
      running = 0;
      for (const Block& block : machine.blocks) running += block.running;
    } else if (!progress(true)) {
      throw Violation{deadlock_report()};
    }
  }
  if (!machine.in_flight.empty()) {
    machine.current = machine.in_flight.front().issuer;
    fail("%s still in flight when its cluster ended", machine.in_flight.front().name);
  }
}

}  // namespace fastscore::emulator
