// Sixteen lanes in portable C++: the meaning of every vector operation that the kernels use.
//
// The compiler turns these loops into whatever the baseline offers (SSE2, NEON). simd_avx2.h and
// simd_avx512.h define the same names with intrinsics. Everything is in an unnamed namespace, and
// nothing from the standard library's templates is used: each translation unit is compiled for
// another instruction set, and the linker must never pick one's inline function for another.
#ifndef QCOMPILE_CPU_ISA_SIMD_SCALAR_H_
#define QCOMPILE_CPU_ISA_SIMD_SCALAR_H_

#include <math.h>

#include <cstdint>
#include <cstring>

#include "codings.h"
#include "packed_layout.h"

namespace qcompile::cpu {
namespace {

struct F {
  float v[16];
};
struct I {
  int32_t v[16];
};
// 4 consecutive k of 16 columns: byte 4 * column + k.
struct Bytes {
  uint8_t v[64];
};

constexpr int kLinearRows = 4;       // rows that share a pass over the weights
constexpr int kRowBlocks = 1;        // column blocks in flight for several rows
constexpr int kChainedOutputs = 1;   // most outputs that have two sums each
constexpr int kFractionChains = 0;   // sums of a row's products with undivided ternary codes, or 0
constexpr int kGemmRows = 4;         // rows of the float micro kernel
constexpr int kGemmVectors = 1;      // its columns, in vectors
constexpr int kThinVectors = 1;      // its columns for up to four rows
constexpr int kVectorRows = 1;       // rows of activations that vector_linear.h takes together
constexpr int kVectorWeights = 1;    // with as many rows of the weight
constexpr int64_t kPanelBlocks = 2;  // column blocks whose codes are unpacked at a time

template <class Result, class Function>
inline Result ForLanes(Function function) {
  Result r;
  for (int i = 0; i < 16; ++i) r.v[i] = function(i);
  return r;
}

inline F Set1(float x) {
  return ForLanes<F>([=](int) { return x; });
}
inline F Zero() { return Set1(0.0f); }
inline F Load(const float* p) {
  F r;
  memcpy(r.v, p, sizeof(r.v));
  return r;
}
// The first n lanes, n <= 16, and zeros; never touches memory past them.
inline F LoadN(const float* p, int64_t n) {
  F r = Zero();
  for (int64_t i = 0; i < n && i < 16; ++i) r.v[i] = p[i];
  return r;
}
inline void Store(float* p, const F& a) { memcpy(p, a.v, sizeof(a.v)); }
inline void StoreN(float* p, const F& a, int64_t n) {
  for (int64_t i = 0; i < n && i < 16; ++i) p[i] = a.v[i];
}
inline F operator+(const F& a, const F& b) {
  return ForLanes<F>([&](int i) { return a.v[i] + b.v[i]; });
}
inline F operator-(const F& a, const F& b) {
  return ForLanes<F>([&](int i) { return a.v[i] - b.v[i]; });
}
inline F operator*(const F& a, const F& b) {
  return ForLanes<F>([&](int i) { return a.v[i] * b.v[i]; });
}
inline F operator/(const F& a, const F& b) {
  return ForLanes<F>([&](int i) { return a.v[i] / b.v[i]; });
}
// a * b + c, rounded once or twice.
inline F Fma(const F& a, const F& b, const F& c) {
  return ForLanes<F>([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
// A NaN in either operand gives the second operand, as on x86.
inline F Max(const F& a, const F& b) {
  return ForLanes<F>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline F Min(const F& a, const F& b) {
  return ForLanes<F>([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
// a < b ? x : y; false for NaN.
inline F SelectLess(const F& a, const F& b, const F& x, const F& y) {
  return ForLanes<F>([&](int i) { return a.v[i] < b.v[i] ? x.v[i] : y.v[i]; });
}
inline float ReduceAdd(const F& a) {
  float half[8];
  for (int i = 0; i < 8; ++i) half[i] = a.v[i] + a.v[i + 8];
  for (int i = 0; i < 4; ++i) half[i] += half[i + 4];
  return (half[0] + half[2]) + (half[1] + half[3]);
}
// The sums of sixteen vectors.
inline F ReduceAdd16(const F* a) {
  return ForLanes<F>([&](int i) { return ReduceAdd(a[i]); });
}
inline float ReduceMax(const F& a) {
  float r = a.v[0];
  for (int i = 1; i < 16; ++i) r = r > a.v[i] ? r : a.v[i];
  return r;
}

inline I Set1(int32_t x) {
  return ForLanes<I>([=](int) { return x; });
}
inline I ZeroI() { return Set1(0); }
inline I LoadBytesAsInts(const uint8_t* p) {
  return ForLanes<I>([=](int i) { return static_cast<int32_t>(p[i]); });
}
inline I operator+(const I& a, const I& b) {
  return ForLanes<I>([&](int i) { return a.v[i] + b.v[i]; });
}
inline I operator-(const I& a, const I& b) {
  return ForLanes<I>([&](int i) { return a.v[i] - b.v[i]; });
}
inline I operator*(const I& a, const I& b) {
  return ForLanes<I>([&](int i) { return a.v[i] * b.v[i]; });
}
inline I Max(const I& a, const I& b) {
  return ForLanes<I>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline I Min(const I& a, const I& b) {
  return ForLanes<I>([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline int32_t ReduceAdd(const I& a) {
  int32_t r = 0;
  for (int i = 0; i < 16; ++i) r += a.v[i];
  return r;
}
inline int32_t ReduceMax(const I& a) {
  int32_t r = a.v[0];
  for (int i = 1; i < 16; ++i) r = r > a.v[i] ? r : a.v[i];
  return r;
}
// The lowest four bits of each lane, and the rest, of lanes that hold bytes.
inline I LowNibbles(const I& a) {
  return ForLanes<I>([&](int i) { return a.v[i] & 15; });
}
inline I HighNibbles(const I& a) {
  return ForLanes<I>([&](int i) { return a.v[i] >> 4; });
}
inline void StoreInts(int32_t* p, const I& a) { memcpy(p, a.v, sizeof(a.v)); }
inline I LoadInts(const int32_t* p) {
  I r;
  memcpy(r.v, p, sizeof(r.v));
  return r;
}
inline F ToFloat(const I& a) {
  return ForLanes<F>([&](int i) { return static_cast<float>(a.v[i]); });
}
// To the nearest integer, ties to even; NaN and out of range give some integer.
inline I Round(const F& a) {
  return ForLanes<I>([&](int i) {
    const bool in_range = a.v[i] > -2147483000.0f && a.v[i] < 2147483000.0f;
    return in_range ? static_cast<int32_t>(lrintf(a.v[i])) : INT32_MIN;
  });
}
// |a| as its bit pattern: ordered like the floats, with infinity and NaN above all.
inline I AbsBits(const F& a) {
  I r;
  memcpy(r.v, a.v, sizeof(r.v));
  for (int i = 0; i < 16; ++i) r.v[i] &= 0x7fffffff;
  return r;
}
// 2^exponent for exponents in -126..127.
inline F PowerOfTwo(const I& exponent) {
  uint32_t bits[16];
  for (int i = 0; i < 16; ++i) bits[i] = (static_cast<uint32_t>(exponent.v[i]) + 127u) << 23;
  F r;
  memcpy(r.v, bits, sizeof(bits));
  return r;
}
template <int kPlaces>
inline I ShiftLeft(const I& a) {
  return ForLanes<I>(
      [&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) << kPlaces); });
}
template <int kPlaces>
inline I ShiftRightSigned(const I& a) {
  return ForLanes<I>([&](int i) { return a.v[i] >> kPlaces; });
}
// The same bits as a float.
inline F AsFloat(const I& a) {
  F r;
  memcpy(r.v, a.v, sizeof(r.v));
  return r;
}
// Sixteen saturated int8.
inline void StoreInt8(int8_t* p, const I& a) {
  for (int i = 0; i < 16; ++i) {
    p[i] = static_cast<int8_t>(a.v[i] < -128 ? -128 : a.v[i] > 127 ? 127 : a.v[i]);
  }
}

inline float HalfToFloat(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t exponent = (h >> 10) & 0x1fu;
  const uint32_t mantissa = h & 0x3ffu;
  if (exponent == 0) {
    const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-8f;  // 2^-24
    return sign != 0 ? -magnitude : magnitude;
  }
  const uint32_t widened = exponent == 31 ? 255u : exponent + 112u;
  const uint32_t bits = sign | (widened << 23) | (mantissa << 13);
  float r;
  memcpy(&r, &bits, sizeof(r));
  return r;
}
// Sixteen float16.
inline F LoadHalf(const uint8_t* p) {
  uint16_t bits[16];
  memcpy(bits, p, sizeof(bits));
  return ForLanes<F>([&](int i) { return HalfToFloat(bits[i]); });
}
// Sixteen bfloat16.
inline F LoadBrain(const uint8_t* p) {
  uint16_t brain[16];
  memcpy(brain, p, sizeof(brain));
  uint32_t bits[16];
  for (int i = 0; i < 16; ++i) bits[i] = static_cast<uint32_t>(brain[i]) << 16;
  F r;
  memcpy(r.v, bits, sizeof(bits));
  return r;
}

// Bits kShift and up of a unit of codes from a plane of kWidth bits; see packed_layout.h. Both
// halves are written if kShift is 0, and added to otherwise.
template <int kWidth, int kShift>
inline void ReadPlane(const uint8_t* p, Bytes* first, Bytes* second) {
  constexpr int kPart = 16 * kWidth;
  constexpr uint64_t kMask = 0x0101010101010101u * ((1u << kWidth) - 1);
#pragma GCC unroll 16
  for (int byte = 0; byte < 128; byte += 8) {
    uint8_t* codes = byte < 64 ? first->v + byte : second->v + byte - 64;
    uint64_t eight, before = 0;
    memcpy(&eight, p + byte % kPart, sizeof(eight));
    if (kShift != 0) memcpy(&before, codes, sizeof(before));
    eight = before | (eight >> (byte / kPart * kWidth) & kMask) << kShift;
    memcpy(codes, &eight, sizeof(eight));
  }
}

// Adds codes . a over 4 k to each column; exact. `four_signed` holds 4 int8.
template <int kBits>
inline I DotAccumulate(const I& sum, const Bytes& codes, int32_t four_signed) {
  int8_t a[4];
  memcpy(a, &four_signed, sizeof(a));
  return ForLanes<I>([&](int i) {
    return sum.v[i] + codes.v[4 * i] * a[0] + codes.v[4 * i + 1] * a[1] +
           codes.v[4 * i + 2] * a[2] + codes.v[4 * i + 3] * a[3];
  });
}

// The codes of one k.
template <int kByte>
inline I ExtractByte(const Bytes& codes) {
  return ForLanes<I>([&](int i) { return static_cast<int32_t>(codes.v[4 * i + kByte]); });
}

// Sixteen floats to look up, and sixteen bytes.
struct FloatTable {
  float v[16];
};
struct ByteTable {
  uint8_t v[16];
};
inline FloatTable LoadFloatTable(const float* p) {
  FloatTable r;
  memcpy(r.v, p, sizeof(r.v));
  return r;
}
inline ByteTable LoadByteTable(const uint8_t* p) {
  ByteTable r;
  memcpy(r.v, p, sizeof(r.v));
  return r;
}
// table[code] for the codes of one k, all below 16.
template <int kByte>
inline F LookUp(const FloatTable& table, const Bytes& codes) {
  return ForLanes<F>([&](int i) { return table.v[codes.v[4 * i + kByte]]; });
}
// The same for a table of any size.
template <int kByte>
inline F LookUpInMemory(const float* table, const Bytes& codes) {
  return ForLanes<F>([&](int i) { return table[codes.v[4 * i + kByte]]; });
}
// table[code] for all codes, which are below 16.
inline Bytes LookUp(const ByteTable& table, const Bytes& codes) {
  Bytes r;
  for (int i = 0; i < 64; ++i) r.v[i] = table.v[codes.v[i]];
  return r;
}
// The floats of 8 bits that the codes of one k are.
template <int kByte>
inline F DecodeE4m3(const Bytes& codes) {
  return ForLanes<F>([&](int i) {
    const uint32_t code = codes.v[4 * i + kByte];
    const uint32_t bits = (code & 0x80u) << 24 | (code & 0x7fu) << 20;
    float r;
    memcpy(&r, &bits, sizeof(r));
    return r * kE4m3Exponents;
  });
}

// Ternary codes: a byte is a fraction whose first digit is its integer part once it is tripled.
inline void DotAccumulate(I* sum, const Bytes& without_sign, const Bytes& with_sign) {
  for (int i = 0; i < 64; ++i) {
    sum->v[i / 4] += without_sign.v[i] * static_cast<int8_t>(with_sign.v[i]);
  }
}
// What brain_tiles.h needs besides.

// The upper 16 bits, rounded to nearest, ties away from zero.
inline F RoundToBrain(const F& a) {
  F r;
  for (int i = 0; i < 16; ++i) {
    uint32_t bits;
    memcpy(&bits, a.v + i, sizeof(bits));
    bits = (bits + 0x8000u) & 0xffff0000u;
    memcpy(r.v + i, &bits, sizeof(bits));
  }
  return r;
}
// The upper 16 bits of both, the second ones above the first.
inline I PairBrains(const F& low, const F& high) {
  return ForLanes<I>([&](int i) {
    uint32_t first, second;
    memcpy(&first, low.v + i, sizeof(first));
    memcpy(&second, high.v + i, sizeof(second));
    return static_cast<int32_t>((first >> 16) | (second & 0xffff0000u));
  });
}

inline void StoreQuad(uint8_t* p, const Bytes& quad) { memcpy(p, quad.v, sizeof(quad.v)); }
// Byte minus the number in its lane.
inline Bytes Subtract(const Bytes& quad, const I& number) {
  Bytes r;
  for (int i = 0; i < 64; ++i) r.v[i] = static_cast<uint8_t>(quad.v[i] - number.v[i / 4]);
  return r;
}
inline Bytes BroadcastFour(const uint8_t* four) {
  Bytes r;
  for (int i = 0; i < 64; ++i) r.v[i] = four[i % 4];
  return r;
}
inline Bytes LoadQuad(const uint8_t* p) {
  Bytes r;
  memcpy(r.v, p, sizeof(r.v));
  return r;
}
inline Bytes FirstDigit(const Bytes& fraction) {
  Bytes r;
  for (int i = 0; i < 64; ++i) r.v[i] = static_cast<uint8_t>(fraction.v[i] * 3 >> 8);
  return r;
}
inline Bytes NextDigits(const Bytes& fraction) {
  Bytes r;
  for (int i = 0; i < 64; ++i) r.v[i] = static_cast<uint8_t>(fraction.v[i] * 3);
  return r;
}
// A quad of codes of 2 bits.
inline Bytes LoadLeftoverQuad(const uint8_t* p) {
  Bytes r;
  for (int i = 0; i < 64; ++i) r.v[i] = p[i % 16] >> i / 16 * 2 & 3;
  return r;
}

// Transposes 16 rows of 16 floats.
inline void Transpose16(const float* src, int64_t src_stride, float* dst, int64_t dst_stride) {
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) dst[j * dst_stride + i] = src[i * src_stride + j];
  }
}

}  // namespace
}  // namespace qcompile::cpu

#endif  // QCOMPILE_CPU_ISA_SIMD_SCALAR_H_
