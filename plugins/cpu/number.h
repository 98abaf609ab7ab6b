// Elements of the three types, read and written as float.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "vtexport/contract.h"

namespace vtexport::cpu {

// Two bytes each; separate types, so that templates can tell them apart.
struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline float to_float(float value) { return value; }

inline float to_float(BFloat16 value) {
  uint32_t wide = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &wide, sizeof result);
  return result;
}

inline float to_float(Float16 value) {
  uint32_t sign = (value.bits & 0x8000u) << 16, exponent = (value.bits >> 10) & 31u, mantissa = value.bits & 1023u;
  float result;
  if (exponent == 0) {  // zero and subnormal: mantissa * 2^-24
    result = std::ldexp(static_cast<float>(mantissa), -24);
    return sign ? -result : result;
  }
  uint32_t wide = sign | (mantissa << 13) | ((exponent == 31 ? 255u : exponent + 112u) << 23);
  std::memcpy(&result, &wide, sizeof result);
  return result;
}

inline void store(float value, float& out) { out = value; }

// To nearest, ties to even, as every framework rounds.
inline void store(float value, BFloat16& out) {
  uint32_t wide;
  std::memcpy(&wide, &value, sizeof wide);
  if (std::isnan(value)) {
    out.bits = static_cast<uint16_t>((wide >> 16) | 0x40u);
    return;
  }
  out.bits = static_cast<uint16_t>((wide + 0x7FFFu + ((wide >> 16) & 1u)) >> 16);
}

inline void store(float value, Float16& out) {
  uint32_t wide;
  std::memcpy(&wide, &value, sizeof wide);
  uint16_t sign = static_cast<uint16_t>((wide >> 16) & 0x8000u);
  if (std::isnan(value)) {
    out.bits = static_cast<uint16_t>(sign | 0x7E00u);
    return;
  }
  float size = std::fabs(value);
  if (size >= 65520.0f) {  // rounds beyond the largest number, 65504
    out.bits = static_cast<uint16_t>(sign | 0x7C00u);
    return;
  }
  if (size < 6.103515625e-05f) {  // subnormal: whole multiples of 2^-24; nearbyint rounds ties to even
    out.bits = static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyint(std::ldexp(size, 24))));
    return;
  }
  uint32_t body = wide & 0x7FFFFFFFu;
  body += 0xFFFu + ((body >> 13) & 1u);
  out.bits = static_cast<uint16_t>(sign | static_cast<uint16_t>((body - (112u << 23)) >> 13));
}

}  // namespace vtexport::cpu
