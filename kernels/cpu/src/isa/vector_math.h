// Elementary functions on sixteen lanes, to a few units in the last place.
//
// Included after one of the simd_*.h. The polynomials are minimax fits made for this file.
#ifndef QCOMPILE_CPU_ISA_VECTOR_MATH_H_
#define QCOMPILE_CPU_ISA_VECTOR_MATH_H_

#include "kernel_table.h"

namespace qcompile::cpu {
namespace {

// exp(x): 0 below -87.3, exp(88) above 88, NaN for NaN.
inline F Exp(F x) {
  const F lowest = Set1(-87.3f);
  // The constant comes first so that a NaN in x survives.
  const F clamped = Min(Set1(88.0f), Max(lowest, x));
  const I exponent = Round(clamped * Set1(1.44269504f));
  const F n = ToFloat(exponent);
  F r = Fma(n, Set1(-0.693145752f), clamped);  // ln 2 in two parts
  r = Fma(n, Set1(-1.42860677e-6f), r);
  F p = Set1(0.00139505f);
  p = Fma(p, r, Set1(0.00836888f));
  p = Fma(p, r, Set1(0.04166621f));
  p = Fma(p, r, Set1(0.16666519f));
  p = Fma(p, r, Set1(0.50000001f));
  p = Fma(p * r, r, r) + Set1(1.0f);
  return SelectLess(x, lowest, Zero(), p * PowerOfTwo(exponent));
}

inline F Sigmoid(F x) { return Set1(1.0f) / (Set1(1.0f) + Exp(Zero() - x)); }

inline F Tanh(F x) {
  const F square = x * x;
  F p = Set1(-0.00571704f);
  p = Fma(p, square, Set1(0.02065058f));
  p = Fma(p, square, Set1(-0.0537435f));
  p = Fma(p, square, Set1(0.13331491f));
  p = Fma(p, square, Set1(-0.33333284f));
  const F small = Fma(p * square, x, x);
  const F large = Set1(1.0f) - Set1(2.0f) / (Set1(1.0f) + Exp(x + x));
  return SelectLess(square, Set1(0.625f * 0.625f), small, large);
}

// The standard normal distribution function of -|x|, to 3e-6 relative.
inline F NormalTail(F x) {
  const F z = Max(x, Zero() - x) * Set1(0.70710678f);
  const F t = Set1(1.0f) / Fma(z, Set1(0.5f), Set1(1.0f));
  // erfc(z) = exp(-z^2) t p(t)
  F p = Set1(-0.0593864843f);
  p = Fma(p, t, Set1(0.286124051f));
  p = Fma(p, t, Set1(-0.490406543f));
  p = Fma(p, t, Set1(0.281733453f));
  p = Fma(p, t, Set1(-0.0291486401f));
  p = Fma(p, t, Set1(0.203752562f));
  p = Fma(p, t, Set1(0.242835104f));
  p = Fma(p, t, Set1(0.282412112f));
  p = Fma(p, t, Set1(0.282084346f));
  return Set1(0.5f) * Exp(Zero() - z * z) * t * p;
}

inline F Gelu(F x) {
  const F tail = NormalTail(x);
  return x * SelectLess(x, Zero(), tail, Set1(1.0f) - tail);
}

inline F GeluTanh(F x) {
  // 0.5 (1 + tanh u) = sigmoid(2 u), which keeps its relative accuracy for negative u.
  const F u = x * Fma(x * x, Set1(0.7978845608f * 0.044715f), Set1(0.7978845608f));
  return x * Sigmoid(u + u);
}

}  // namespace
}  // namespace qcompile::cpu

#endif  // QCOMPILE_CPU_ISA_VECTOR_MATH_H_
