// Sixteen lanes in two AVX registers. See simd_scalar.h for what each function means.
//
// AVX-VNNI, if the file is compiled for it, has the dot product of bytes that AVX2 lacks.
#ifndef QCOMPILE_CPU_ISA_SIMD_AVX2_H_
#define QCOMPILE_CPU_ISA_SIMD_AVX2_H_

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "codings.h"
#include "packed_layout.h"

namespace qcompile::cpu {
namespace {

struct F {
  __m256 lo, hi;
};
struct I {
  __m256i lo, hi;
};
struct Bytes {
  __m256i lo, hi;
};

// Sixteen registers: four rows of two-register sums, codes and constants just fit.
constexpr int kLinearRows = 4;
constexpr int kRowBlocks = 1;       // column blocks in flight for several rows
constexpr int kChainedOutputs = 2;  // most outputs that have two sums each
#if defined(__AVXVNNI__)
constexpr int kFractionChains = 1;
#else
constexpr int kFractionChains = 0;  // products with bytes above 127 cost more than their digits
#endif
constexpr int kGemmRows = 4;
constexpr int kGemmVectors = 1;
constexpr int kThinVectors = 1;
constexpr int kVectorRows = 2;     // rows of activations that vector_linear.h takes together
constexpr int kVectorWeights = 2;  // with as many rows of the weight
constexpr int64_t kPanelBlocks = 1;
// Twelve sums, a column block and four activations.
constexpr int64_t kPanelRows = 6;
constexpr int64_t kLeastPanelRows = 16;

inline __m256i LaneMask(int64_t n) {
  const __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), index);
}

inline F Zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F Set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F Load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline F LoadN(const float* p, int64_t n) {
  return {_mm256_maskload_ps(p, LaneMask(n)), _mm256_maskload_ps(p + 8, LaneMask(n - 8))};
}
inline void Store(float* p, F a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
inline void StoreN(float* p, F a, int64_t n) {
  _mm256_maskstore_ps(p, LaneMask(n), a.lo);
  _mm256_maskstore_ps(p + 8, LaneMask(n - 8), a.hi);
}
inline F operator+(F a, F b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline F operator-(F a, F b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline F operator*(F a, F b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline F operator/(F a, F b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline F Fma(F a, F b, F c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline F Max(F a, F b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline F Min(F a, F b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline F SelectLess(F a, F b, F x, F y) {
  return {_mm256_blendv_ps(y.lo, x.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)),
          _mm256_blendv_ps(y.hi, x.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ))};
}
inline float ReduceAdd(F a) {
  const __m256 s = _mm256_add_ps(a.lo, a.hi);
  __m128 r = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  r = _mm_add_ps(r, _mm_movehl_ps(r, r));
  return _mm_cvtss_f32(_mm_add_ss(r, _mm_movehdup_ps(r)));
}
inline F ReduceAdd16(const F* a) {
  float sums[16];
  for (int i = 0; i < 16; ++i) sums[i] = ReduceAdd(a[i]);
  return Load(sums);
}
inline float ReduceMax(F a) {
  const __m256 s = _mm256_max_ps(a.lo, a.hi);
  __m128 r = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  r = _mm_max_ps(r, _mm_movehl_ps(r, r));
  return _mm_cvtss_f32(_mm_max_ss(r, _mm_movehdup_ps(r)));
}

inline I ZeroI() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline I Set1(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline I LoadBytesAsInts(const uint8_t* p) {
  return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8)))};
}
inline I operator+(I a, I b) {
  return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)};
}
inline I operator-(I a, I b) {
  return {_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)};
}
inline I operator*(I a, I b) {
  return {_mm256_mullo_epi32(a.lo, b.lo), _mm256_mullo_epi32(a.hi, b.hi)};
}
inline I Max(I a, I b) { return {_mm256_max_epi32(a.lo, b.lo), _mm256_max_epi32(a.hi, b.hi)}; }
inline I Min(I a, I b) { return {_mm256_min_epi32(a.lo, b.lo), _mm256_min_epi32(a.hi, b.hi)}; }
inline int32_t ReduceAdd(I a) {
  const __m256i s = _mm256_add_epi32(a.lo, a.hi);
  __m128i r = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
  r = _mm_add_epi32(r, _mm_shuffle_epi32(r, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(r, _mm_shuffle_epi32(r, 0xb1)));
}
inline int32_t ReduceMax(I a) {
  const __m256i s = _mm256_max_epi32(a.lo, a.hi);
  __m128i r = _mm_max_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
  r = _mm_max_epi32(r, _mm_shuffle_epi32(r, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(r, _mm_shuffle_epi32(r, 0xb1)));
}
inline I LowNibbles(I a) {
  const __m256i mask = _mm256_set1_epi32(15);
  return {_mm256_and_si256(a.lo, mask), _mm256_and_si256(a.hi, mask)};
}
inline I HighNibbles(I a) { return {_mm256_srli_epi32(a.lo, 4), _mm256_srli_epi32(a.hi, 4)}; }
inline void StoreInts(int32_t* p, I a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.lo);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), a.hi);
}
inline F ToFloat(I a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
inline I Round(F a) { return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }
inline I AbsBits(F a) {
  const __m256i mask = _mm256_set1_epi32(0x7fffffff);
  return {_mm256_and_si256(_mm256_castps_si256(a.lo), mask),
          _mm256_and_si256(_mm256_castps_si256(a.hi), mask)};
}
inline F PowerOfTwo(I exponent) {
  const __m256i bias = _mm256_set1_epi32(127);
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(exponent.lo, bias), 23)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(exponent.hi, bias), 23))};
}
template <int kPlaces>
inline I ShiftLeft(I a) {
  return {_mm256_slli_epi32(a.lo, kPlaces), _mm256_slli_epi32(a.hi, kPlaces)};
}
template <int kPlaces>
inline I ShiftRightSigned(I a) {
  return {_mm256_srai_epi32(a.lo, kPlaces), _mm256_srai_epi32(a.hi, kPlaces)};
}
inline F AsFloat(I a) { return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)}; }
inline void StoreInt8(int8_t* p, I a) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.lo, a.hi), 0xd8);
  const __m128i bytes =
      _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}

inline F LoadHalf(const uint8_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16)))};
}
inline __m256 BrainToFloat(const uint8_t* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline F LoadBrain(const uint8_t* p) { return {BrainToFloat(p), BrainToFloat(p + 16)}; }

inline __m256i Load32(const uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

// Moves every bit towards bit 0, or away from it; callers mask what crosses a byte.
template <int kPlaces>
inline __m256i ShiftRight(__m256i bytes) {
  if constexpr (kPlaces >= 0) {
    return _mm256_srli_epi16(bytes, kPlaces);
  } else {
    return _mm256_slli_epi16(bytes, -kPlaces);
  }
}

template <int kShift, int kPlaces>
inline void ReadBits(__m256i plane, int mask, __m256i* codes) {
  const __m256i bits =
      _mm256_and_si256(ShiftRight<kPlaces>(plane), _mm256_set1_epi8(static_cast<char>(mask)));
  *codes = kShift == 0 ? bits : _mm256_or_si256(*codes, bits);
}

template <int kWidth, int kShift>
inline void ReadPlane(const uint8_t* p, Bytes* first, Bytes* second) {
  constexpr int kMask = ((1 << kWidth) - 1) << kShift;
  if constexpr (kWidth == 8) {
    *first = {Load32(p), Load32(p + 32)};
    *second = {Load32(p + 64), Load32(p + 96)};
  } else if constexpr (kWidth == 4) {
    const __m256i lo = Load32(p), hi = Load32(p + 32);
    ReadBits<kShift, 0 - kShift>(lo, kMask, &first->lo);
    ReadBits<kShift, 0 - kShift>(hi, kMask, &first->hi);
    ReadBits<kShift, 4 - kShift>(lo, kMask, &second->lo);
    ReadBits<kShift, 4 - kShift>(hi, kMask, &second->hi);
  } else {
    __m256i quarters;  // of the picture, from bits 0, 2, 4 and 6
    if constexpr (kWidth == 2) {
      quarters = Load32(p);
    } else {
      // Eighths come in pairs, of which the second is one bit further up.
      const __m128i plane = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
      quarters = _mm256_srlv_epi32(_mm256_broadcastsi128_si256(plane),
                                   _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1));
    }
    ReadBits<kShift, 0 - kShift>(quarters, kMask, &first->lo);
    ReadBits<kShift, 2 - kShift>(quarters, kMask, &first->hi);
    ReadBits<kShift, 4 - kShift>(quarters, kMask, &second->lo);
    ReadBits<kShift, 6 - kShift>(quarters, kMask, &second->hi);
  }
}

template <int kBits>
inline __m256i DotFour(__m256i sum, __m256i codes, __m256i signed_bytes) {
#if defined(__AVXVNNI__)
  return _mm256_dpbusd_avx_epi32(sum, codes, signed_bytes);
#else
  if constexpr (kBits < 8) {
    // Two products of at most 127 * 127 fit 16 bits, so maddubs does not saturate.
    const __m256i pairs = _mm256_maddubs_epi16(codes, signed_bytes);
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  } else {
    // 255 * 127 * 2 does not fit: widen even and odd bytes to 16 bits instead.
    const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(signed_bytes, 8), 8);
    const __m256i odd = _mm256_srai_epi16(signed_bytes, 8);
    const __m256i codes_even = _mm256_and_si256(codes, _mm256_set1_epi16(0x00ff));
    const __m256i codes_odd = _mm256_srli_epi16(codes, 8);
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(codes_even, even));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(codes_odd, odd));
  }
#endif
}

template <int kBits>
inline I DotAccumulate(I sum, Bytes codes, int32_t four_signed) {
  const __m256i a = _mm256_set1_epi32(four_signed);
  return {DotFour<kBits>(sum.lo, codes.lo, a), DotFour<kBits>(sum.hi, codes.hi, a)};
}

// What the kernels of linear_panel.h need besides.

inline I LoadInts(const int32_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8))};
}
inline void StoreQuad(uint8_t* p, Bytes quad) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), quad.lo);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32), quad.hi);
}
inline Bytes Subtract(Bytes quad, I number) {
  const I four = number * Set1(0x01010101);
  return {_mm256_sub_epi8(quad.lo, four.lo), _mm256_sub_epi8(quad.hi, four.hi)};
}
inline Bytes BroadcastFour(const uint8_t* four) {
  int32_t bits;
  memcpy(&bits, four, sizeof(bits));
  const __m256i bytes = _mm256_set1_epi32(bits);
  return {bytes, bytes};
}
// In assembly for the reason that simd_avx512.h gives.
inline void DotAccumulate(I* sum, Bytes without_sign, Bytes with_sign) {
#if defined(__AVXVNNI__)
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum->lo) : "x"(without_sign.lo), "x"(with_sign.lo));
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum->hi) : "x"(without_sign.hi), "x"(with_sign.hi));
#else
  sum->lo = DotFour<8>(sum->lo, without_sign.lo, with_sign.lo);
  sum->hi = DotFour<8>(sum->hi, without_sign.hi, with_sign.hi);
#endif
}

// What panel_words.h needs besides. Its products are in assembly, so that the compiler does not
// work on many at a time, for which there are no registers.

// Two sums of 16 bits to each 32-bit lane.
struct Words {
  __m256i lo, hi;
};
inline Words ZeroWords() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline void AddBytePairs(__m256i* sum, __m256i without_sign, __m256i with_sign) {
  __m256i pairs;
  asm("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0"
      : "+x"(*sum), "=&x"(pairs)
      : "x"(without_sign), "x"(with_sign));
}
inline void AddBytePairs(Words* sum, Bytes without_sign, Bytes with_sign) {
  AddBytePairs(&sum->lo, without_sign.lo, with_sign.lo);
  AddBytePairs(&sum->hi, without_sign.hi, with_sign.hi);
}
inline I Widen(Words sum) {
  const __m256i one = _mm256_set1_epi16(1);
  return {_mm256_madd_epi16(sum.lo, one), _mm256_madd_epi16(sum.hi, one)};
}
// Bytes 0 and 2 of each lane, and 1 and 3, less a number, with 16 bits each.
inline Bytes EvenWords(Bytes quad, I number) {
  const __m256i mask = _mm256_set1_epi16(0x00ff);
  const I both = number * Set1(0x00010001);
  return {_mm256_sub_epi16(_mm256_and_si256(quad.lo, mask), both.lo),
          _mm256_sub_epi16(_mm256_and_si256(quad.hi, mask), both.hi)};
}
inline Bytes OddWords(Bytes quad, I number) {
  return EvenWords({_mm256_srli_epi16(quad.lo, 8), _mm256_srli_epi16(quad.hi, 8)}, number);
}
inline void AddWordPairs(__m256i* sum, __m256i a, __m256i b) {
  __m256i pairs;
  asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(*sum), "=&x"(pairs) : "x"(a), "x"(b));
}
inline void AddWordPairs(I* sum, Bytes a, Bytes b) {
  AddWordPairs(&sum->lo, a.lo, b.lo);
  AddWordPairs(&sum->hi, a.hi, b.hi);
}

template <int kByte>
inline I ExtractByte(Bytes codes) {
  const __m256i mask = _mm256_set1_epi32(0xff);
  return {_mm256_and_si256(_mm256_srli_epi32(codes.lo, 8 * kByte), mask),
          _mm256_and_si256(_mm256_srli_epi32(codes.hi, 8 * kByte), mask)};
}

struct FloatTable {
  __m256 low, high;  // entries 0 to 7, and 8 to 15
};
struct ByteTable {
  __m256i v;
};
inline FloatTable LoadFloatTable(const float* p) {
  return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
}
inline ByteTable LoadByteTable(const uint8_t* p) {
  return {_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
template <int kByte>
inline __m256 LookUpEight(FloatTable table, __m256i codes) {
  // A permutation reads the lowest three bits of an index, a blend the highest bit of a lane.
  const __m256i index = _mm256_srli_epi32(codes, 8 * kByte);
  const __m256i eighth = _mm256_slli_epi32(codes, 28 - 8 * kByte);
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.low, index),
                          _mm256_permutevar8x32_ps(table.high, index), _mm256_castsi256_ps(eighth));
}
template <int kByte>
inline F LookUp(FloatTable table, Bytes codes) {
  return {LookUpEight<kByte>(table, codes.lo), LookUpEight<kByte>(table, codes.hi)};
}
template <int kByte>
inline F LookUpInMemory(const float* table, Bytes codes) {
  const I index = ExtractByte<kByte>(codes);
  return {_mm256_i32gather_ps(table, index.lo, sizeof(float)),
          _mm256_i32gather_ps(table, index.hi, sizeof(float))};
}
inline Bytes LookUp(ByteTable table, Bytes codes) {
  return {_mm256_shuffle_epi8(table.v, codes.lo), _mm256_shuffle_epi8(table.v, codes.hi)};
}
template <int kByte>
inline __m256 DecodeEightE4m3(__m256i codes) {
  const __m256i high = _mm256_slli_epi32(codes, 24 - 8 * kByte);
  const __m256i sign = _mm256_and_si256(high, _mm256_set1_epi32(INT32_MIN));
  const __m256i rest = _mm256_and_si256(_mm256_srli_epi32(high, 4), _mm256_set1_epi32(0x07f00000));
  return _mm256_mul_ps(_mm256_castsi256_ps(_mm256_or_si256(sign, rest)),
                       _mm256_set1_ps(kE4m3Exponents));
}
template <int kByte>
inline F DecodeE4m3(Bytes codes) {
  return {DecodeEightE4m3<kByte>(codes.lo), DecodeEightE4m3<kByte>(codes.hi)};
}

inline Bytes LoadQuad(const uint8_t* p) { return {Load32(p), Load32(p + 32)}; }
inline __m256i FirstDigit(__m256i fraction) {
  // 3 x reaches 256 at 86 and 512 at 171.
  const __m256i one = _mm256_set1_epi8(1);
  const __m256i past_85 = _mm256_subs_epu8(fraction, _mm256_set1_epi8(85));
  const __m256i past_170 = _mm256_subs_epu8(fraction, _mm256_set1_epi8(static_cast<char>(170)));
  return _mm256_add_epi8(_mm256_min_epu8(past_85, one), _mm256_min_epu8(past_170, one));
}
inline Bytes FirstDigit(Bytes fraction) {
  return {FirstDigit(fraction.lo), FirstDigit(fraction.hi)};
}
inline Bytes NextDigits(Bytes fraction) {
  return {_mm256_add_epi8(fraction.lo, _mm256_add_epi8(fraction.lo, fraction.lo)),
          _mm256_add_epi8(fraction.hi, _mm256_add_epi8(fraction.hi, fraction.hi))};
}
inline Bytes LoadLeftoverQuad(const uint8_t* p) {
  const __m256i plane =
      _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i mask = _mm256_set1_epi8(3);
  const __m256i first = _mm256_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2);
  const __m256i second = _mm256_setr_epi32(4, 4, 4, 4, 6, 6, 6, 6);
  return {_mm256_and_si256(_mm256_srlv_epi32(plane, first), mask),
          _mm256_and_si256(_mm256_srlv_epi32(plane, second), mask)};
}

inline void Transpose8(const float* src, int64_t src_stride, float* dst, int64_t dst_stride) {
  __m256 r[8], t[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(src + i * src_stride);
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(dst + i * dst_stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    _mm256_storeu_ps(dst + (i + 4) * dst_stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
}

inline void Transpose16(const float* src, int64_t src_stride, float* dst, int64_t dst_stride) {
  for (int i = 0; i < 16; i += 8) {
    for (int j = 0; j < 16; j += 8) {
      Transpose8(src + i * src_stride + j, src_stride, dst + j * dst_stride + i, dst_stride);
    }
  }
}

}  // namespace
}  // namespace qcompile::cpu

#endif  // QCOMPILE_CPU_ISA_SIMD_AVX2_H_
