// Sixteen lanes in one AVX-512 register. See simd_scalar.h for what each function means.
#ifndef QCOMPILE_CPU_ISA_SIMD_AVX512_H_
#define QCOMPILE_CPU_ISA_SIMD_AVX512_H_

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "codings.h"
#include "packed_layout.h"

namespace qcompile::cpu {
namespace {

struct F {
  __m512 v;
};
struct I {
  __m512i v;
};
struct Bytes {
  __m512i v;
};

constexpr int kLinearRows = 8;       // rows that share a pass over the weights
constexpr int kRowBlocks = 2;        // column blocks in flight for several rows
constexpr int kChainedOutputs = 4;   // most outputs that have two sums each
constexpr int kFractionChains = 5;   // sums of a row's products with undivided ternary codes, or 0
constexpr int kGemmRows = 8;         // rows of the float micro kernel
constexpr int kGemmVectors = 2;      // its columns, in vectors
constexpr int kThinVectors = 4;      // its columns for up to four rows
constexpr int kVectorRows = 4;       // rows of activations that vector_linear.h takes together
constexpr int kVectorWeights = 4;    // with as many rows of the weight
constexpr int64_t kPanelBlocks = 2;  // column blocks whose codes are unpacked at a time
constexpr int64_t kPanelRows = 12;   // rows that go through them together
// By measurement on Zen 5: from here on groups of 32 gain, and groups of 128 lose no more than 5%.
constexpr int64_t kLeastPanelRows = 64;

inline __mmask16 FirstLanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }

inline F Zero() { return {_mm512_setzero_ps()}; }
inline F Set1(float x) { return {_mm512_set1_ps(x)}; }
inline F Load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline F LoadN(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(FirstLanes(n), p)}; }
inline void Store(float* p, F a) { _mm512_storeu_ps(p, a.v); }
inline void StoreN(float* p, F a, int64_t n) { _mm512_mask_storeu_ps(p, FirstLanes(n), a.v); }
inline F operator+(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F operator-(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F operator*(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F operator/(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F Fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F Max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F Min(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F SelectLess(F a, F b, F x, F y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}
inline float ReduceAdd(F a) { return _mm512_reduce_add_ps(a.v); }
inline float ReduceMax(F a) { return _mm512_reduce_max_ps(a.v); }
// The sums of sixteen vectors.
inline F ReduceAdd16(const F* a) {
  __m512 fours[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    // Lanes 0..3 of each 128 bits: partial sums of the vectors 4 i .. 4 i + 3.
    __m512 pairs[2];
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m512 x = a[4 * i + 2 * j].v, y = a[4 * i + 2 * j + 1].v;
      pairs[j] = _mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y));
    }
    const __m512d x = _mm512_castps_pd(pairs[0]), y = _mm512_castps_pd(pairs[1]);
    fours[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)),
                             _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  }
  const auto halves = [](__m512 x, __m512 y) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd));
  };
  return {halves(halves(fours[0], fours[1]), halves(fours[2], fours[3]))};
}

inline I ZeroI() { return {_mm512_setzero_si512()}; }
inline I Set1(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline I LoadBytesAsInts(const uint8_t* p) {
  return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline I operator+(I a, I b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline I operator-(I a, I b) { return {_mm512_sub_epi32(a.v, b.v)}; }
inline I operator*(I a, I b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
inline I Max(I a, I b) { return {_mm512_max_epi32(a.v, b.v)}; }
inline I Min(I a, I b) { return {_mm512_min_epi32(a.v, b.v)}; }
inline int32_t ReduceAdd(I a) { return _mm512_reduce_add_epi32(a.v); }
inline int32_t ReduceMax(I a) { return _mm512_reduce_max_epi32(a.v); }
inline I LowNibbles(I a) { return {_mm512_and_si512(a.v, _mm512_set1_epi32(15))}; }
inline I HighNibbles(I a) { return {_mm512_srli_epi32(a.v, 4)}; }
inline void StoreInts(int32_t* p, I a) { _mm512_storeu_si512(p, a.v); }
inline F ToFloat(I a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline I Round(F a) { return {_mm512_cvtps_epi32(a.v)}; }
inline I AbsBits(F a) {
  return {_mm512_and_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(0x7fffffff))};
}
inline F PowerOfTwo(I exponent) {
  return {_mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_add_epi32(exponent.v, _mm512_set1_epi32(127)), 23))};
}
template <int kPlaces>
inline I ShiftLeft(I a) {
  return {_mm512_slli_epi32(a.v, kPlaces)};
}
template <int kPlaces>
inline I ShiftRightSigned(I a) {
  return {_mm512_srai_epi32(a.v, kPlaces)};
}
inline F AsFloat(I a) { return {_mm512_castsi512_ps(a.v)}; }
inline void StoreInt8(int8_t* p, I a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(a.v));
}

inline F LoadHalf(const uint8_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline F LoadBrain(const uint8_t* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}

// From each byte of a plane the bits that stand `right[i]` places above where they belong, i being
// the 128-bit lane. A rotation also moves them up, and none of them leaves its byte.
template <int kWidth, int kShift>
inline void ReadBits(__m512i plane, __m512i right, Bytes* codes) {
  constexpr int kMask = ((1 << kWidth) - 1) << kShift;
  const __m512i moved = _mm512_rorv_epi32(plane, right);
  const __m512i mask = _mm512_set1_epi8(static_cast<char>(kMask));
  if constexpr (kShift == 0) {
    codes->v = _mm512_and_si512(moved, mask);
  } else {
    constexpr int kOrAnd = 0xf8;  // a | (b & c)
    codes->v = _mm512_ternarylogic_epi32(codes->v, moved, mask, kOrAnd);
  }
}

template <int kWidth, int kShift>
inline void ReadPlane(const uint8_t* p, Bytes* first, Bytes* second) {
  if constexpr (kWidth == 8) {
    first->v = _mm512_loadu_si512(p);
    second->v = _mm512_loadu_si512(p + 64);
  } else if constexpr (kWidth == 4) {
    static_assert(kShift == 0);
    const __m512i plane = _mm512_loadu_si512(p);
    const __m512i nibble = _mm512_set1_epi8(0x0f);
    first->v = _mm512_and_si512(plane, nibble);
    second->v = _mm512_and_si512(_mm512_srli_epi16(plane, 4), nibble);
  } else {
    __m512i plane, places;
    if constexpr (kWidth == 2) {
      plane = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
      places = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 2, 2, 2, 2, 2, 2, 2, 2);
    } else {
      plane = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
      places = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    }
    const __m512i right = _mm512_sub_epi32(places, _mm512_set1_epi32(kShift));
    ReadBits<kWidth, kShift>(plane, right, first);
    ReadBits<kWidth, kShift>(plane, _mm512_add_epi32(right, _mm512_set1_epi32(4)), second);
  }
}

template <int kBits>
inline I DotAccumulate(I sum, Bytes codes, int32_t four_signed) {
  return {_mm512_dpbusd_epi32(sum.v, codes.v, _mm512_set1_epi32(four_signed))};
}

// What the kernels of linear_panel.h need besides.

inline I LoadInts(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
inline void StoreQuad(uint8_t* p, Bytes quad) { _mm512_storeu_si512(p, quad.v); }
// Byte minus the number in its 32-bit lane.
inline Bytes Subtract(Bytes quad, I number) {
  return {_mm512_sub_epi8(quad.v, _mm512_mullo_epi32(number.v, _mm512_set1_epi32(0x01010101)))};
}
inline Bytes BroadcastFour(const uint8_t* four) {
  int32_t bits;
  memcpy(&bits, four, sizeof(bits));
  return {_mm512_set1_epi32(bits)};
}
// GCC 12 copies the sum when the intrinsic has to update many of them in a loop, and keeps half of
// them on the stack.
inline void DotAccumulate(I* sum, Bytes without_sign, Bytes with_sign) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum->v) : "v"(without_sign.v), "v"(with_sign.v));
}

// What brain_tiles.h needs besides.

inline F RoundToBrain(F a) {
  const __m512i bits = _mm512_add_epi32(_mm512_castps_si512(a.v), _mm512_set1_epi32(0x8000));
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  return {_mm512_castsi512_ps(_mm512_and_si512(bits, upper))};
}
inline I PairBrains(F low, F high) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  constexpr int kOrAnd = 0xf8;  // a | (b & c)
  return {_mm512_ternarylogic_epi32(_mm512_srli_epi32(_mm512_castps_si512(low.v), 16),
                                    _mm512_castps_si512(high.v), upper, kOrAnd)};
}

template <int kByte>
inline I ExtractByte(Bytes codes) {
  return {_mm512_and_si512(_mm512_srli_epi32(codes.v, 8 * kByte), _mm512_set1_epi32(0xff))};
}

struct FloatTable {
  __m512 v;
};
struct ByteTable {
  __m512i v;
};
inline FloatTable LoadFloatTable(const float* p) { return {_mm512_loadu_ps(p)}; }
inline ByteTable LoadByteTable(const uint8_t* p) {
  return {_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
template <int kByte>
inline F LookUp(FloatTable table, Bytes codes) {
  // A permutation reads no more than the lowest four bits of each index.
  return {_mm512_permutexvar_ps(_mm512_srli_epi32(codes.v, 8 * kByte), table.v)};
}
template <int kByte>
inline F LookUpInMemory(const float* table, Bytes codes) {
  return {_mm512_i32gather_ps(ExtractByte<kByte>(codes).v, table, sizeof(float))};
}
inline Bytes LookUp(ByteTable table, Bytes codes) {
  return {_mm512_shuffle_epi8(table.v, codes.v)};
}
template <int kByte>
inline F DecodeE4m3(Bytes codes) {
  const __m512i high = _mm512_slli_epi32(codes.v, 24 - 8 * kByte);
  const __m512i sign = _mm512_and_si512(high, _mm512_set1_epi32(INT32_MIN));
  constexpr int kOrAnd = 0xf8;  // a | (b & c)
  const __m512i bits = _mm512_ternarylogic_epi32(sign, _mm512_srli_epi32(high, 4),
                                                 _mm512_set1_epi32(0x07f00000), kOrAnd);
  return {_mm512_mul_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps(kE4m3Exponents))};
}

inline Bytes LoadQuad(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline Bytes FirstDigit(Bytes fraction) {
  // 3 x reaches 256 at 86 and 512 at 171.
  const __m512i one = _mm512_set1_epi8(1);
  const __m512i past_85 = _mm512_subs_epu8(fraction.v, _mm512_set1_epi8(85));
  const __m512i past_170 = _mm512_subs_epu8(fraction.v, _mm512_set1_epi8(static_cast<char>(170)));
  return {_mm512_add_epi8(_mm512_min_epu8(past_85, one), _mm512_min_epu8(past_170, one))};
}
inline Bytes NextDigits(Bytes fraction) {
  return {_mm512_add_epi8(fraction.v, _mm512_add_epi8(fraction.v, fraction.v))};
}
inline Bytes LoadLeftoverQuad(const uint8_t* p) {
  const __m512i plane =
      _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m512i places = _mm512_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2, 4, 4, 4, 4, 6, 6, 6, 6);
  return {_mm512_and_si512(_mm512_srlv_epi32(plane, places), _mm512_set1_epi8(3))};
}

// Transposes 16 rows of 16 floats.
inline void Transpose16(const float* src, int64_t src_stride, float* dst, int64_t dst_stride) {
  __m512 r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(src + i * src_stride);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    _mm512_storeu_ps(dst + i * dst_stride, _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88));
    _mm512_storeu_ps(dst + (i + 4) * dst_stride, _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88));
    _mm512_storeu_ps(dst + (i + 8) * dst_stride, _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd));
    _mm512_storeu_ps(dst + (i + 12) * dst_stride, _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd));
  }
}

}  // namespace
}  // namespace qcompile::cpu

#endif  // QCOMPILE_CPU_ISA_SIMD_AVX512_H_
