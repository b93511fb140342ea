// wgmma is asynchronous: the operands in shared memory are read, and the accumulators written, at some time between the
// commit of a group and the wait for it; until then the accumulators are NaN.
#pragma once
#include <cuda_runtime.h>

#include "emulator/floats.h"
#include "emulator/memory.h"

namespace fastscore::emulator {

// Where lane l of warp w keeps element i of the result: see csrc/ptx/wgmma.cuh.
inline int wgmma_row(int thread, int i) { return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8; }
inline int wgmma_column(int thread, int i) { return i / 4 * 8 + 2 * (thread % 4) + i % 2; }

// Row-major [rows][16] of a matrix of which a descriptor tells the place.
inline void read_matrix(Block& block, uint64_t descriptor, int rows, float (*out)[16], const char* name) {
  uint32_t start = (descriptor & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  // Of the swizzle of 128 bytes (1), 64 (2) or 32 (3): rows of that length, whose 16-byte units are moved by the row.
  const uint32_t mode = static_cast<uint32_t>(descriptor >> 62), bytes = 256 >> mode;
  if (mode == 0) fail("wgmma: descriptor 0x%lx has no swizzle that is known", (unsigned long)descriptor);
  if (stride != 8 * bytes) fail("wgmma: descriptor 0x%lx with 8 rows in %u bytes", (unsigned long)descriptor, stride);
  if ((descriptor >> 49 & 7) != 0) fail("wgmma: descriptor 0x%lx has a base offset", (unsigned long)descriptor);
  for (int row = 0; row < rows; row++)
    for (int half = 0; half < 2; half++) {
      uint32_t address = start + row / 8 * stride + row % 8 * bytes + half * 16;
      address ^= (address >> 7 & (bytes / 16 - 1)) << 4;
      uint16_t values[8];
      memcpy(values, asynchronous_read(block, address, name), 16);
      for (int i = 0; i < 8; i++) out[row][8 * half + i] = from_bf16(values[i]);
    }
}

inline void perform_wgmma(Block& block, WgmmaOperation& operation) {
  static float b[256][16], transposed[16][256];
  read_matrix(block, operation.b_descriptor, operation.n, b, "wgmma (b)");
  if (!operation.a_in_registers)
    read_matrix(block, operation.a_descriptor, 64, reinterpret_cast<float (*)[16]>(operation.a.data()), "wgmma (a)");
  for (int n = 0; n < operation.n; n++)
    for (int k = 0; k < 16; k++) transposed[k][n] = b[n][k];
  for (int m = 0; m < 64; m++)
    for (int n = 0; n < operation.n; n += 16) {  // 16 columns at a time, which the compiler keeps in registers
      float* sums = &operation.accumulators->value[m * operation.n + n];
      float columns[16];
      for (int i = 0; i < 16; i++) columns[i] = operation.accumulate ? sums[i] : 0;
      for (int k = 0; k < 16; k++)
        for (int i = 0; i < 16; i++) columns[i] += operation.a[m][k] * transposed[k][n + i];
      for (int i = 0; i < 16; i++) sums[i] = columns[i];
    }
}

// The oldest group of a warpgroup: all its products, then the accumulators that no later product adds to.
inline void perform_wgmma_group(Block& block, int warpgroup) {
  WgmmaQueue& queue = block.warpgroups[warpgroup].wgmma;
  for (; queue.operations_done < queue.groups.front().end; queue.operations_done++, queue.operations.pop_front()) {
    perform_wgmma(block, queue.operations.front());
    queue.operations.front().accumulators->pending--;
  }
  queue.groups.pop_front();
  queue.groups_done++;
  queue.accumulators.remove_if([](const Accumulators& sums) {
    if (sums.pending > 0) return false;
    for (int thread = 0; thread < kWarpgroupSize; thread++)
      for (int i = 0; i < sums.n / 2; i++)
        sums.registers[thread][i] = sums.value[wgmma_row(thread, i) * sums.n + wgmma_column(thread, i)];
    return true;
  });
  for (Thread& thread : machine.threads)
    if (thread.wgmma.waiting && thread.block == &block && thread.id / kWarpgroupSize == warpgroup) wake(thread);
}

// The accumulators in flight that thread `id` keeps at `d`; null if those registers are free.
inline Accumulators* find_accumulators(WgmmaQueue& queue, int id, const float* d, int n) {
  for (Accumulators& sums : queue.accumulators) {
    const float* other = sums.registers[id];
    if (!other || other + sums.n / 2 <= d || d + n / 2 <= other) continue;
    if (other != d || sums.n != n)
      fail("wgmma with n = %d on a part of the accumulators of a wgmma in flight with n = %d", n, sums.n);
    return &sums;
  }
  return nullptr;
}

// Thread by thread: the k-th wgmma of every thread of the warpgroup is one operation.
inline void issue_wgmma(float* d, int n, const uint32_t* a, uint64_t a_descriptor, uint64_t b_descriptor,
                        bool accumulate) {
  require_capability("wgmma", 9, true);
  Thread& thread = current_thread();
  WgmmaQueue& queue = thread.block->warpgroups[thread.id / kWarpgroupSize].wgmma;
  int id = thread.id % kWarpgroupSize;
  Accumulators* sums = find_accumulators(queue, id, d, n);
  uint64_t position = thread.wgmma.issued++ - queue.operations_done;
  if (position == queue.operations.size()) {
    WgmmaOperation& operation = queue.operations.emplace_back();
    operation.n = n, operation.a_in_registers = a != nullptr, operation.accumulate = accumulate;
    operation.a_descriptor = a_descriptor, operation.b_descriptor = b_descriptor;
    if (!sums) {
      queue.accumulators.push_back({n, 0, std::vector<float>(64 * n), {}});
      operation.accumulators = &queue.accumulators.back();
    } else {
      operation.accumulators = sums;
    }
    operation.accumulators->pending++;
  }
  WgmmaOperation& operation = queue.operations[position];
  if (operation.n != n || operation.a_in_registers != (a != nullptr) || operation.accumulate != accumulate ||
      operation.a_descriptor != a_descriptor || operation.b_descriptor != b_descriptor)
    fail(
        "wgmma (n %d, a 0x%lx, b 0x%lx, accumulate %d) where another thread of the warpgroup has (%d, 0x%lx, 0x%lx, "
        "%d)",
        n, (unsigned long)a_descriptor, (unsigned long)b_descriptor, accumulate, operation.n,
        (unsigned long)operation.a_descriptor, (unsigned long)operation.b_descriptor, operation.accumulate);
  for (int i = 0; a && i < 4; i++)
    for (int half = 0; half < 2; half++)
      operation.a[wgmma_row(thread.id % 128, 2 * (i % 2))][2 * (id % 4) + 8 * (i / 2) + half] =
          from_bf16(static_cast<uint16_t>(a[i] >> 16 * half));
  if (sums) {
    if (sums != operation.accumulators) fail("wgmma with other accumulators than another thread of the warpgroup");
    return;
  }
  if (!thread.wgmma.fenced) fail("wgmma without wgmma_fence since the last wait");
  sums = operation.accumulators;
  sums->registers[id] = d;
  for (int i = 0; i < n / 2; i++) {
    if (accumulate) sums->value[wgmma_row(id, i) * n + wgmma_column(id, i)] = d[i];
    d[i] = std::bit_cast<float>(~0u);
  }
}

inline void commit_wgmma() {
  preempt();
  Thread& thread = current_thread();
  int warpgroup = thread.id / kWarpgroupSize;
  WgmmaQueue& queue = thread.block->warpgroups[warpgroup].wgmma;
  thread.wgmma.committed = thread.wgmma.issued;
  uint64_t position = thread.wgmma.groups++ - queue.groups_done;
  if (position == queue.groups.size()) queue.groups.push_back({thread.wgmma.committed, 0});
  WgmmaGroup& group = queue.groups[position];
  if (group.end != thread.wgmma.committed) fail("wgmma_commit of other wgmma than another thread of the warpgroup");
  if (++group.threads == kWarpgroupSize)
    start_asynchronous("wgmma", false, [block = thread.block, warpgroup] { perform_wgmma_group(*block, warpgroup); });
}

inline void wait_wgmma(uint64_t may_be_in_flight) {
  Thread& thread = current_thread();
  WgmmaQueue& queue = thread.block->warpgroups[thread.id / kWarpgroupSize].wgmma;
  if (thread.wgmma.issued != thread.wgmma.committed) fail("wgmma_wait before wgmma_commit");
  thread.wgmma.fenced = false;
  thread.wgmma.waiting = true;
  while (queue.groups_done + may_be_in_flight < thread.wgmma.groups)
    block("wgmma_wait", static_cast<uint32_t>(may_be_in_flight));
  thread.wgmma.waiting = false;
}

}  // namespace fastscore::emulator

namespace fastscore::ptx {

inline uint64_t wgmma_descriptor(uint32_t address) {
  if (address % 16 != 0) emulator::fail("wgmma_descriptor of 0x%x, which is not aligned to 16 bytes", address);
  return (address & 0x3ffff) >> 4 | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

inline uint64_t wgmma_descriptor_64(uint32_t address) {
  if (address % 16 != 0) emulator::fail("wgmma_descriptor_64 of 0x%x, which is not aligned to 16 bytes", address);
  return (address & 0x3ffff) >> 4 | uint64_t{1} << 16 | uint64_t{512 >> 4} << 32 | uint64_t{2} << 62;
}

inline uint64_t wgmma_descriptor_32(uint32_t address) {
  if (address % 16 != 0) emulator::fail("wgmma_descriptor_32 of 0x%x, which is not aligned to 16 bytes", address);
  return (address & 0x3ffff) >> 4 | uint64_t{1} << 16 | uint64_t{256 >> 4} << 32 | uint64_t{3} << 62;
}

inline void wgmma_fence() { emulator::current_thread().wgmma.fenced = true; }

inline void wgmma_commit() { emulator::commit_wgmma(); }

template <int N>
void wgmma_wait() {
  emulator::wait_wgmma(N);
}

template <int N>
void wgmma_hold(float (&)[N]) {}

template <int OFFSET, int N, int M>
void wgmma_hold_part(float (&)[M]) {}

template <int N, int OFFSET = 0, int M>
void wgmma(float (&d)[M], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b, bool accumulate) {
  static_assert(N == 16 || N == 32 || N == 64 || N == 128 || N == 256);
  static_assert(OFFSET >= 0 && OFFSET + N / 2 <= M);
  const uint32_t a[4] = {a0, a1, a2, a3};
  emulator::issue_wgmma(d + OFFSET, N, a, 0, b, accumulate);
}

template <int N, int OFFSET = 0, int M>
void wgmma(float (&d)[M], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(N == 16 || N == 32 || N == 64 || N == 128 || N == 256);
  static_assert(OFFSET >= 0 && OFFSET + N / 2 <= M);
  emulator::issue_wgmma(d + OFFSET, N, nullptr, a, b, accumulate);
}

}  // namespace fastscore::ptx
