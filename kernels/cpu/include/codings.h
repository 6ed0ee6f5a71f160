// The numbers that codes of fixed codings stand for. `kernels/lookup/levels.py` has the same.
#ifndef QCOMPILE_CPU_CODINGS_H_
#define QCOMPILE_CPU_CODINGS_H_

#include <cstdint>

namespace qcompile::cpu {

// e2m1: a sign, two exponent bits and one mantissa bit.
constexpr float kE2m1Levels[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                   -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};
// The same as whole numbers of 1/2, above -6: what products of bytes take.
constexpr uint8_t kE2m1Steps[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
constexpr int kE2m1ZeroStep = 12;
constexpr float kE2m1Step = 0.5f;

constexpr float kTernaryLevels[16] = {-1.0f, 0.0f, 1.0f};
constexpr int kTernaryZero = 1;

// A float of 8 bits whose exponent and mantissa become those of a float32, bit for bit, has an
// exponent that is too small by the difference of the biases, 127 - 7. Subnormal numbers too.
constexpr float kE4m3Exponents = 0x1p120f;

}  // namespace qcompile::cpu

#endif  // QCOMPILE_CPU_CODINGS_H_
