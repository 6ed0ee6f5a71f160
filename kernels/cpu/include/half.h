// Floats of 16 bits as float32.
#ifndef QCOMPILE_CPU_HALF_H_
#define QCOMPILE_CPU_HALF_H_

#include <cstdint>
#include <cstring>

namespace qcompile::cpu {

inline float BitsToFloat(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline float HalfToFloat(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t exponent = half >> 10 & 0x1fu, mantissa = half & 0x3ffu;
  if (exponent == 0) {  // subnormal: mantissa * 2^-24
    const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
    return sign != 0 ? -magnitude : magnitude;
  }
  return BitsToFloat(sign | (exponent == 31 ? 255u : exponent + 112u) << 23 | mantissa << 13);
}

inline float Bfloat16ToFloat(uint16_t bits) {
  return BitsToFloat(static_cast<uint32_t>(bits) << 16);
}

}  // namespace qcompile::cpu

#endif  // QCOMPILE_CPU_HALF_H_
