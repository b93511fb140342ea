// Operations that threads do together.
#pragma once
#include <cstring>

#include "scheduler.h"

namespace fastscore::emulator {

// The lanes of `mask` meet in operation `name`; the last to come runs operation(payloads by lane) for all of them.
template <class Payload, class Operation>
void warp_collective(const char* name, uint32_t mask, Payload& payload, Operation operation) {
  Thread& thread = current_thread();
  Collective& meeting = thread.warp->collective;
  uint32_t self = 1u << thread.lane;
  if (!(mask & self)) fail("%s: the mask 0x%x is without the lane itself", name, mask);
  if (meeting.arrived == 0) {
    meeting.name = name, meeting.mask = mask;
  } else if (strcmp(meeting.name, name) != 0 || meeting.mask != mask) {
    fail("%s (mask 0x%x) where other lanes of the warp are in %s (mask 0x%x)", name, mask, meeting.name, meeting.mask);
  }
  meeting.payload[thread.lane] = &payload;
  meeting.arrived |= self;
  if (meeting.arrived != mask) return block(name, mask, meeting.arrived);
  Payload* payloads[kWarpSize];
  for (int lane = 0; lane < kWarpSize; lane++) payloads[lane] = static_cast<Payload*>(meeting.payload[lane]);
  operation(payloads);
  meeting.arrived = 0;
  thread.warp->ready |= mask;
}

// Waits at a barrier for `threads` threads; all go on when the last arrives.
inline void meet(Barrier& barrier, int threads, const char* name, uint32_t id = 0) {
  if (barrier.arrived == 0) barrier.expected = threads;
  if (barrier.expected != threads)
    fail("%s(%u) for %d threads where others gave %d", name, id, threads, barrier.expected);
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    wake_all(barrier.waiting);
  } else {
    barrier.waiting.push_back(&current_thread());
    block(name, id, threads);
  }
}

// bar.sync: sixteen barriers in a CTA, counted by whole warps.
inline void meet_named(int id, int threads, const char* name) {
  if (id < 0 || id > 15) fail("%s: barrier %d is not one of 0..15", name, id);
  if (threads <= 0 || threads % kWarpSize != 0) fail("%s: %d threads are not whole warps", name, threads);
  meet(current_thread().block->barriers[id], threads, name, id);
}

}  // namespace fastscore::emulator
