// Conversions rounded as the hardware does; the special functions are those of the C library, not its approximations.
#pragma once
#include <cuda_runtime.h>

#include "emulator/floats.h"

namespace fastscore::ptx {

inline uint32_t pack_bf16(float lo, float hi) { return emulator::to_bf16(lo) | uint32_t{emulator::to_bf16(hi)} << 16; }
inline uint32_t pack_f16(float lo, float hi) { return emulator::to_f16(lo) | uint32_t{emulator::to_f16(hi)} << 16; }

inline float2 unpack_f16(uint32_t packed) {
  return {emulator::from_f16(packed & 0xffff), emulator::from_f16(packed >> 16)};
}

inline float copied(float x) { return x; }
inline float max_nan(float x, float y) { return x > y || x != x ? x : y; }
inline float tanh_approx(float x) { return std::tanh(x); }
inline float exp2_approx(float x) { return std::exp2(x); }
inline float log2_approx(float x) { return std::log2(x); }
inline float sqrt_approx(float x) { return std::sqrt(x); }
inline float rsqrt_approx(float x) { return 1 / std::sqrt(x); }
inline float reciprocal_approx(float x) { return 1 / x; }

}  // namespace fastscore::ptx
