// Tensor cores of a warpgroup (128 threads): asynchronous products of 64-row tiles, bfloat16 with float32 sums
// (sm_90a).
//
// Order of use: wgmma_fence, wgmma calls, wgmma_commit, wgmma_wait, wgmma_hold, then read the accumulators.
// Thread t of the warpgroup (warp w = t / 32, lane l = t % 32) holds of the 64 x N result, for c < N / 8 and i < 4,
// d[4 c + i] = result[16 w + l / 4 + 8 (i / 2)][8 c + 2 (l % 4) + i % 2]; packed in pairs, these are a registers of the
// next layer.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace fastscore::ptx {

// Matrix in shared memory, K contiguous in rows of 128 bytes with the 128-byte swizzle; 8 rows are 1024 bytes.
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t address) {
  constexpr uint64_t stride = uint64_t{1024 >> 4} << 32, unused_leading_offset = uint64_t{1} << 16;
  constexpr uint64_t swizzle_128 = uint64_t{1} << 62;
  return ((address & 0x3ffff) >> 4) | unused_leading_offset | stride | swizzle_128;
}

// The same in rows of 64 bytes with the 64-byte swizzle: 16-byte unit c of row r lies at c ^ (r / 2 % 4); 8 rows are 512
// bytes.
__device__ __forceinline__ uint64_t wgmma_descriptor_64(uint32_t address) {
  constexpr uint64_t stride = uint64_t{512 >> 4} << 32, unused_leading_offset = uint64_t{1} << 16;
  constexpr uint64_t swizzle_64 = uint64_t{2} << 62;
  return ((address & 0x3ffff) >> 4) | unused_leading_offset | stride | swizzle_64;
}

// The same in rows of 32 bytes with the 32-byte swizzle: 16-byte unit c of row r lies at c ^ (r / 4 % 2); 8 rows are 256
// bytes.
__device__ __forceinline__ uint64_t wgmma_descriptor_32(uint32_t address) {
  constexpr uint64_t stride = uint64_t{256 >> 4} << 32, unused_leading_offset = uint64_t{1} << 16;
  constexpr uint64_t swizzle_32 = uint64_t{3} << 62;
  return ((address & 0x3ffff) >> 4) | unused_leading_offset | stride | swizzle_32;
}

// Orders earlier accesses to registers before the wgmma that follow.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Makes a group of the wgmma since the last group.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most the N latest groups are in flight.
template <int N>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Keeps the compiler from moving reads of the accumulators before the wait that this follows; no instruction.
template <int N>
__device__ __forceinline__ void wgmma_hold(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// The same for N of them from OFFSET on, while others are in flight.
template <int OFFSET, int N, int M>
__device__ __forceinline__ void wgmma_hold_part(float (&d)[M]) {
  static_assert(OFFSET >= 0 && OFFSET + N <= M);
#pragma unroll
  for (int i = OFFSET; i < OFFSET + N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// Operands %0, %1, ... of inline assembly, ten at a time (the argument is the tens digit), and the accumulators they
// name.
#define FASTSCORE_TEN(t) \
  "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9"
#define FASTSCORE_OPERANDS_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define FASTSCORE_OPERANDS_16 FASTSCORE_TEN() ", %10, %11, %12, %13, %14, %15"
#define FASTSCORE_OPERANDS_30 FASTSCORE_TEN() ", " FASTSCORE_TEN(1) ", " FASTSCORE_TEN(2)
#define FASTSCORE_OPERANDS_60 FASTSCORE_OPERANDS_30 ", " FASTSCORE_TEN(3) ", " FASTSCORE_TEN(4) ", " FASTSCORE_TEN(5)
#define FASTSCORE_OPERANDS_90 FASTSCORE_OPERANDS_60 ", " FASTSCORE_TEN(6) ", " FASTSCORE_TEN(7) ", " FASTSCORE_TEN(8)
#define FASTSCORE_OPERANDS_120 FASTSCORE_OPERANDS_90 ", " FASTSCORE_TEN(9) ", " FASTSCORE_TEN(10) ", " FASTSCORE_TEN(11)
#define FASTSCORE_OPERANDS_32 FASTSCORE_OPERANDS_30 ", %30, %31"
#define FASTSCORE_OPERANDS_64 FASTSCORE_OPERANDS_60 ", %60, %61, %62, %63"
#define FASTSCORE_OPERANDS_128 FASTSCORE_OPERANDS_120 ", %120, %121, %122, %123, %124, %125, %126, %127"

#define FASTSCORE_SUMS_4(i) \
  "+f"(d[OFFSET + i]), "+f"(d[OFFSET + i + 1]), "+f"(d[OFFSET + i + 2]), "+f"(d[OFFSET + i + 3])
#define FASTSCORE_SUMS_8(i) FASTSCORE_SUMS_4(i), FASTSCORE_SUMS_4(i + 4)
#define FASTSCORE_SUMS_16(i) FASTSCORE_SUMS_8(i), FASTSCORE_SUMS_8(i + 8)
#define FASTSCORE_SUMS_32(i) FASTSCORE_SUMS_16(i), FASTSCORE_SUMS_16(i + 16)
#define FASTSCORE_SUMS_64(i) FASTSCORE_SUMS_32(i), FASTSCORE_SUMS_32(i + 32)
#define FASTSCORE_SUMS_128(i) FASTSCORE_SUMS_64(i), FASTSCORE_SUMS_64(i + 64)

// One instruction with `sums` = n / 2 accumulators; the operands after them are named by their numbers. The ones scale
// a and b, the last zeros say that the matrices in shared memory are not transposed.
#define FASTSCORE_WGMMA_REGISTERS(n, sums, i0, i1, i2, i3, ib, iaccumulate)                           \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #iaccumulate                                      \
               ", 0;\n"                                                                               \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" FASTSCORE_OPERANDS_##sums \
               "}, {%" #i0 ", %" #i1 ", %" #i2 ", %" #i3 "}, %" #ib ", p, 1, 1, 0;\n}"                \
               : FASTSCORE_SUMS_##sums(0)                                                             \
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(static_cast<uint32_t>(accumulate)))
#define FASTSCORE_WGMMA_SHARED(n, sums, ia, ib, iaccumulate)                                          \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #iaccumulate                                      \
               ", 0;\n"                                                                               \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" FASTSCORE_OPERANDS_##sums \
               "}, %" #ia ", %" #ib ", p, 1, 1, 0, 0;\n}"                                             \
               : FASTSCORE_SUMS_##sums(0)                                                             \
               : "l"(a), "l"(b), "r"(static_cast<uint32_t>(accumulate)))

// d[OFFSET..] (+)= a b^T with a of 64 x 16 in registers and b of N x 16 in shared memory.
template <int N, int OFFSET = 0, int M>
__device__ __forceinline__ void wgmma(float (&d)[M], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b,
                                      bool accumulate) {
  static_assert(N == 16 || N == 32 || N == 64 || N == 128 || N == 256);
  static_assert(OFFSET >= 0 && OFFSET + N / 2 <= M);
  if constexpr (N == 16) FASTSCORE_WGMMA_REGISTERS(16, 8, 8, 9, 10, 11, 12, 13);
  if constexpr (N == 32) FASTSCORE_WGMMA_REGISTERS(32, 16, 16, 17, 18, 19, 20, 21);
  if constexpr (N == 64) FASTSCORE_WGMMA_REGISTERS(64, 32, 32, 33, 34, 35, 36, 37);
  if constexpr (N == 128) FASTSCORE_WGMMA_REGISTERS(128, 64, 64, 65, 66, 67, 68, 69);
  if constexpr (N == 256) FASTSCORE_WGMMA_REGISTERS(256, 128, 128, 129, 130, 131, 132, 133);
}

// d[OFFSET..] (+)= a b^T with a of 64 x 16 and b of N x 16 in shared memory.
template <int N, int OFFSET = 0, int M>
__device__ __forceinline__ void wgmma(float (&d)[M], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(N == 16 || N == 32 || N == 64 || N == 128 || N == 256);
  static_assert(OFFSET >= 0 && OFFSET + N / 2 <= M);
  if constexpr (N == 16) FASTSCORE_WGMMA_SHARED(16, 8, 8, 9, 10);
  if constexpr (N == 32) FASTSCORE_WGMMA_SHARED(32, 16, 16, 17, 18);
  if constexpr (N == 64) FASTSCORE_WGMMA_SHARED(64, 32, 32, 33, 34);
  if constexpr (N == 128) FASTSCORE_WGMMA_SHARED(128, 64, 64, 65, 66);
  if constexpr (N == 256) FASTSCORE_WGMMA_SHARED(256, 128, 128, 129, 130);
}

#undef FASTSCORE_WGMMA_REGISTERS
#undef FASTSCORE_WGMMA_SHARED
#undef FASTSCORE_TEN
#undef FASTSCORE_OPERANDS_8
#undef FASTSCORE_OPERANDS_16
#undef FASTSCORE_OPERANDS_30
#undef FASTSCORE_OPERANDS_60
#undef FASTSCORE_OPERANDS_90
#undef FASTSCORE_OPERANDS_120
#undef FASTSCORE_OPERANDS_32
#undef FASTSCORE_OPERANDS_64
#undef FASTSCORE_OPERANDS_128
#undef FASTSCORE_SUMS_4
#undef FASTSCORE_SUMS_8
#undef FASTSCORE_SUMS_16
#undef FASTSCORE_SUMS_32
#undef FASTSCORE_SUMS_64
#undef FASTSCORE_SUMS_128

}  // namespace fastscore::ptx
