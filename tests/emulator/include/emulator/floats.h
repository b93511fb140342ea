// bfloat16 and float16 values, rounded to nearest, ties to even.
#pragma once
#include <bit>
#include <cstdint>

namespace fastscore::emulator {

inline float from_bf16(uint16_t value) { return std::bit_cast<float>(uint32_t{value} << 16); }

inline uint16_t to_bf16(float value) {
  uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;  // NaN
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float from_f16(uint16_t value) {
  uint32_t sign = uint32_t{value & 0x8000u} << 16, magnitude = value & 0x7fff;
  if (magnitude >= 0x7c00) return std::bit_cast<float>(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // As a float16 the exponent is 112 smaller; the product is exact and also normalises subnormal values.
  float scaled = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(scaled) | sign);
}

inline uint16_t to_f16(float value) {
  uint32_t bits = std::bit_cast<uint32_t>(value), magnitude = bits & 0x7fffffff;
  uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  if (magnitude > 0x7f800000) return 0x7fff;          // NaN
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // from 65520 on, infinity
  if (magnitude < 0x38800000) {                       // below 2^-14: 0.5f has the spacing of subnormal float16 values
    float rounded = std::bit_cast<float>(magnitude) + 0.5f;
    return sign | static_cast<uint16_t>(std::bit_cast<uint32_t>(rounded) - std::bit_cast<uint32_t>(0.5f));
  }
  return sign | static_cast<uint16_t>((magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13);
}

}  // namespace fastscore::emulator
