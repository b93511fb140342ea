// The team of width 1,024 (wide.cuh): two blocks of a cluster share 64 samples, each with 512 of the columns in the
// registers of its two warpgroups.
//
//   block 0: columns 0 .. 511             block 1: columns 512 .. 1,023
//   A: own half, 64 KB  -----copy-----\ /-----copy-----  A: own half
//      the partner's    <-------------- X -------------> the partner's
//
// A warpgroup multiplies by the half that its block has written, while a thread of the block, the courier, copies that
// half to the partner; then by the half that has arrived. What may be written when is told by barriers in shared memory:
//   shared    own warpgroups: the own half is written, with a proxy fence, since copies and wgmma read past the ordinary
//             stores; the courier copies
//   vacant    the partner's warps: they have multiplied by what was copied to them; the courier copies over it
//   arrived   the bytes of the partner's half
//   copied    a thread of the partner, when those of ours have arrived: the own half may be written
// Sums of norms go to the partner by asynchronous stores, and are counted at a barrier a buffer.
#pragma once

#include <cuda_runtime.h>
#include <steps.h>

#include <common/steps/pair_rings.cuh>
#include <ptx/remote.cuh>
#include <ptx/shared.cuh>

namespace fastscore {

constexpr uint32_t kHalfBytes = 64 * 512 * 2;  // of the operand
constexpr int kSumBuffers = 3;
constexpr uint32_t kPairSumBytes = kSumBuffers * 4 * 64 * 4;  // a number a buffer, warpgroup and sample

struct Meetings {
  uint32_t base;
  static constexpr uint32_t kBytes = 64;

  __device__ __forceinline__ uint32_t shared() const { return base; }
  __device__ __forceinline__ uint32_t vacant() const { return base + 8; }
  __device__ __forceinline__ uint32_t arrived() const { return base + 16; }
  __device__ __forceinline__ uint32_t copied() const { return base + 24; }
  __device__ __forceinline__ uint32_t sums(int buffer) const { return base + 32 + 8 * buffer; }

  // Before barriers that end with a fence (Barriers::initialize).
  __device__ __forceinline__ void initialize() const {
    ptx::mbarrier_init(shared(), 1);
    ptx::mbarrier_init(vacant(), 8);
    ptx::mbarrier_init(arrived(), 1);
    ptx::mbarrier_init(copied(), 1);
    for (int buffer = 0; buffer < kSumBuffers; ++buffer) ptx::mbarrier_init(sums(buffer), 1);
  }
};

// Bytes of shared memory beside weights and records: the operand, sums, barriers.
static_assert(2 * kHalfBytes + kPairSumBytes + Meetings::kBytes == kPairScratchBytes, "as the plan divides it");

struct BlockPair {
  static constexpr int kOutputs = 16;
  enum Buffer { kMeans, kSquares, kResult };

  PairRings product;
  Meetings meetings;
  uint32_t own;         // the thread's two samples in the first buffer: four warpgroups have 256 bytes each
  uint32_t turn = 0;    // parity of the products whose operands cross
  uint32_t phases = 0;  // parities of the buffers' next sums, a bit each

  __device__ __forceinline__ BlockPair(const Barriers& barriers, uint32_t operand, uint32_t weights, int group,
                                       int thread)
      : product(barriers, operand, weights, group),
        meetings{operand + 2 * kHalfBytes + kPairSumBytes},
        own(operand + 2 * kHalfBytes + 512 * Seat::half() + 256 * group + 8 * (8 * (thread / 32) + thread % 32 / 4)) {}

  __device__ __forceinline__ bool stores() const { return Seat::half() == 0 && threadIdx.x < 128; }
  __device__ __forceinline__ int first_column() const { return 512 * Seat::half(); }

  // The own half may be written: both warpgroups have multiplied by it, and the partner has it.
  __device__ __forceinline__ void vacate() const {
    ptx::mbarrier_wait(meetings.copied(), turn ^ 1);
    ptx::named_barrier_sync(1, 256);
  }
  __device__ __forceinline__ void share_data() const {
    ptx::fence_proxy_async();
    ptx::named_barrier_sync(1, 256);
  }
  __device__ __forceinline__ void share() const {
    share_data();
    if (threadIdx.x == 0) ptx::mbarrier_arrive(meetings.shared());
  }

  // A buffer is written again past a product whose operands cross, which nobody makes before it has read the buffer; the
  // result has one of its own, since none crosses between it and the next row's means.
  __device__ __forceinline__ void put(Buffer buffer, float2 v) const {
    const bool sends = buffer != kResult || Seat::half() == 1, gets = buffer != kResult || Seat::half() == 0;
    if (gets && threadIdx.x == 0) ptx::mbarrier_expect(meetings.sums(buffer), 64 * 2 * 4);
    if (threadIdx.x % 4 != 0) return;
    const uint32_t at = own + 1024 * buffer;
    ptx::store_shared(at, v);
    if (sends) ptx::store_remote(at, v, meetings.sums(buffer), Seat::partner());
  }

  // The sum of all four, the same to the bit in both blocks; the result only where it is stored.
  __device__ __forceinline__ float2 get(Buffer buffer, float2 v) {
    if (buffer == kResult && !stores()) return v;
    ptx::mbarrier_wait(meetings.sums(buffer), phases >> buffer & 1);
    phases ^= 1u << buffer;
    const uint32_t at = own + 1024 * buffer;
    const auto beside = ptx::load_shared<float2>(at ^ 256);
    const auto there = ptx::load_shared<float2>(at ^ 512), also = ptx::load_shared<float2>(at ^ 768);
    return make_float2((v.x + beside.x) + (there.x + also.x), (v.y + beside.y) + (there.y + also.y));
  }

  __device__ __forceinline__ void first(float (&h)[128]) {
    product.multiply<PairRings::kFirst>(h, [] {});
  }
  __device__ __forceinline__ void hidden(float (&h)[128]) {
    product.multiply<PairRings::kHidden>(h, [&] { receive(); });
    leave();
  }
  __device__ __forceinline__ void last(float (&F)[kOutputs / 2]) {
    product.multiply_few<kOutputs>(F, [&] { receive(); });
    leave();
  }

  // Keys and x of the columns that the last product makes: a quarter of them, where x_t has all in every block.
  template <class Source>
  __device__ __forceinline__ Source of_outputs(const Source& samples) const {
    Source found = samples;
    found.column = 32 * Seat::half() + 16 * (threadIdx.x / 128) + 4 * (threadIdx.x % 4);
    return found;
  }

 private:
  // The partner's half is there: tell that it is, and multiply by it.
  __device__ __forceinline__ void receive() const {
    ptx::mbarrier_wait(meetings.arrived(), turn);
    if (threadIdx.x == 0) ptx::mbarrier_arrive_remote(meetings.copied(), Seat::partner());
  }
  __device__ __forceinline__ void leave() {
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive_remote(meetings.vacant(), Seat::partner());
    turn ^= 1;
  }
};

// The courier: it copies the own half of every operand behind that of the partner, but for x_t.
__device__ __forceinline__ void carry(const Steps& p, const Meetings& meetings, uint32_t operand, Unit unit) {
  constexpr uint32_t kCopyBytes = 8192;  // at once, so that weights find a gap
  constexpr int kTurns = PairRings::kStages * PairRings::kWarpgroups;
  const int crossing = (p.tiles / kTurns - PairRings::kFirst - PairRings::kLast) / PairRings::kHidden + 1;
  uint32_t turn = 0;
  for (; unit.left > 0; unit.advance(p)) {
    for (int product = 0; product < crossing; ++product, turn ^= 1) {
      ptx::mbarrier_wait(meetings.shared(), turn);
      ptx::mbarrier_expect(meetings.arrived(), kHalfBytes);  // the partner's, which may be on their way
      ptx::mbarrier_wait(meetings.vacant(), turn ^ 1);
      for (uint32_t at = operand; at < operand + kHalfBytes; at += kCopyBytes) {
        ptx::bulk_copy_remote(at + kHalfBytes, at, kCopyBytes, meetings.arrived(), Seat::partner());
      }
    }
  }
}

}  // namespace fastscore
