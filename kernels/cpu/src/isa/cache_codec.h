// Rows of key/value caches from numbers, and back.
//
// Included after one of the simd_*.h.
#ifndef QCOMPILE_CPU_ISA_CACHE_CODEC_H_
#define QCOMPILE_CPU_ISA_CACHE_CODEC_H_

#include <math.h>

#include <cstring>

#include "cache_row.h"
#include "elementwise.h"
#include "kernel_table.h"

namespace qcompile::cpu {
namespace {

// A float16 without a sign.
inline float NumberOfHalf(uint16_t half) {
  constexpr uint32_t kInfinity = 0x7c00;
  // Exponents are biased by 15 there and by 127 here.
  const uint32_t bits =
      half >= kInfinity ? 0x7f800000u | (uint32_t{half} & 0x3ffu) << 13 : uint32_t{half} << 13;
  float number;
  memcpy(&number, &bits, sizeof(number));
  return half >= kInfinity ? number : number * 5.192296858534828e33f;  // 2^112
}

// The float16 nearest to x >= 0, ties to even.
inline uint16_t HalfOfNumber(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  if (bits > 0x7f800000u) return 0x7e00;   // NaN
  if (bits >= 0x47800000u) return 0x7c00;  // 2^16 and above: infinity
  if (bits < 0x38800000u) {                // below 2^-14: half an ulp of 0.5 is what a step is
    const float shifted = x + 0.5f;
    memcpy(&bits, &shifted, sizeof(bits));
    return static_cast<uint16_t>(bits - 0x3f000000u);
  }
  bits += 0xfffu + ((bits >> 13) & 1u);
  return static_cast<uint16_t>((bits - 0x38000000u) >> 13);
}

// The bfloat16 nearest to x, ties to even; NaN stays one.
inline uint16_t BrainOfNumber(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

struct CacheGrid {
  uint16_t half;  // the scale as it is stored
  float scale;
  int32_t zero_point;
};

// The grid that spans 0 and n numbers.
inline CacheGrid GridOf(const float* x, int64_t n, int32_t last) {
  F least = Zero(), most = Zero(), wrong = Zero();
  for (int64_t d = 0; d < n; d += 16) {
    const F v = LoadN(x + d, Least(16, n - d));
    least = Min(least, v);
    most = Max(most, v);
    wrong = wrong + v * Zero();
  }
  const float low = -ReduceMax(Zero() - least), high = ReduceMax(most);
  CacheGrid g = {HalfOfNumber((high - low) / static_cast<float>(last)), 0.0f, 0};
  if (g.half == 0) g.half = 0x3c00;  // 1
  if (ReduceAdd(wrong) != 0.0f) g.half = 0x7e00;
  g.scale = NumberOfHalf(g.half);
  if (g.scale < INFINITY) {
    int32_t steps[16];
    StoreInts(steps, Round(Set1(-low / g.scale)));
    g.zero_point = steps[0] < 0 ? 0 : steps[0] > last ? last : steps[0];
  }
  return g;
}

// Codes of n <= 16 numbers.
inline void EncodeLanes(const float* x, int64_t n, const CacheGrid& g, int32_t last,
                        uint8_t* codes) {
  I steps = Round(LoadN(x, n) / Set1(g.scale)) + Set1(g.zero_point);
  steps = Set1(last) - Max(Set1(last) - Max(steps, ZeroI()), ZeroI());
  int32_t lanes[16];
  StoreInts(lanes, steps);
  for (int64_t i = 0; i < n; ++i) codes[i] = static_cast<uint8_t>(lanes[i]);
}

inline void EncodeGroups(const CacheRow& r, const float* x, uint8_t* row) {
  const bool nibbles = r.format == CacheFormat::kInt4;
  const int32_t last = nibbles ? 15 : 255;
  if (nibbles) memset(row, 0, static_cast<size_t>(r.half()));
  for (int64_t group = 0; group < r.groups; ++group) {
    const int64_t begin = group * r.group_size;
    const int64_t end = Least(begin + r.group_size, r.width);
    const CacheGrid g = GridOf(x + begin, end - begin, last);
    memcpy(row + r.scales_at() + 2 * group, &g.half, sizeof(g.half));
    row[r.zero_points_at() + group] = static_cast<uint8_t>(g.zero_point);
    for (int64_t d = begin; d < end; d += 16) {
      const int64_t n = Least(16, end - d);
      uint8_t codes[16];
      EncodeLanes(x + d, n, g, last, codes);
      for (int64_t i = 0; i < n; ++i) {
        if (!nibbles) {
          row[d + i] = codes[i];
        } else if (d + i < r.half()) {
          row[d + i] = static_cast<uint8_t>(row[d + i] | codes[i]);
        } else {
          row[d + i - r.half()] = static_cast<uint8_t>(row[d + i - r.half()] | codes[i] << 4);
        }
      }
    }
  }
}

void EncodeCacheRow(const CacheRow& r, const float* x, uint8_t* row) {
  switch (r.format) {
    case CacheFormat::kFloat:
      memcpy(row, x, sizeof(float) * static_cast<size_t>(r.width));
      return;
    case CacheFormat::kBrain:
      for (int64_t d = 0; d < r.width; ++d) {
        const uint16_t brain = BrainOfNumber(x[d]);
        memcpy(row + 2 * d, &brain, sizeof(brain));
      }
      return;
    default:
      EncodeGroups(r, x, row);
  }
}

enum class CodePart { kByte, kLowNibble, kHighNibble };

template <CodePart kPart>
inline int32_t CodeOf(uint8_t byte) {
  return kPart == CodePart::kByte ? byte : kPart == CodePart::kLowNibble ? byte & 15 : byte >> 4;
}

template <CodePart kPart>
inline I LoadCodes(const uint8_t* p) {
  const I bytes = LoadBytesAsInts(p);
  if constexpr (kPart == CodePart::kByte) return bytes;
  return kPart == CodePart::kLowNibble ? LowNibbles(bytes) : HighNibbles(bytes);
}

template <CodePart kPart>
inline void DecodeCodes(const uint8_t* codes, int64_t n, float scale, int32_t zero_point,
                        float* out) {
  int64_t d = 0;
  for (; d + 16 <= n; d += 16) {
    Store(out + d, ToFloat(LoadCodes<kPart>(codes + d) - Set1(zero_point)) * Set1(scale));
  }
  for (; d < n; ++d) {
    out[d] = static_cast<float>(CodeOf<kPart>(codes[d]) - zero_point) * scale;
  }
}

inline void DecodeGroups(const CacheRow& r, const uint8_t* row, float* out) {
  const int64_t half = r.half();
  for (int64_t group = 0; group < r.groups; ++group) {
    const int64_t begin = group * r.group_size;
    const int64_t end = Least(begin + r.group_size, r.width);
    uint16_t bits;
    memcpy(&bits, row + r.scales_at() + 2 * group, sizeof(bits));
    const float scale = NumberOfHalf(bits);
    const int32_t zero = row[r.zero_points_at() + group];
    if (r.format == CacheFormat::kInt8) {
      DecodeCodes<CodePart::kByte>(row + begin, end - begin, scale, zero, out + begin);
      continue;
    }
    const int64_t middle = Least(end, half < begin ? begin : half);
    DecodeCodes<CodePart::kLowNibble>(row + begin, middle - begin, scale, zero, out + begin);
    DecodeCodes<CodePart::kHighNibble>(row + middle - half, end - middle, scale, zero,
                                       out + middle);
  }
}

inline void DecodeCacheRow(const CacheRow& r, const uint8_t* row, float* out) {
  if (r.format != CacheFormat::kBrain) return DecodeGroups(r, row, out);
  int64_t d = 0;
  for (; d + 16 <= r.width; d += 16) Store(out + d, LoadBrain(row + 2 * d));
  for (; d < r.width; ++d) {
    uint32_t bits = 0;
    memcpy(reinterpret_cast<uint8_t*>(&bits) + 2, row + 2 * d, 2);
    memcpy(out + d, &bits, sizeof(bits));
  }
}

}  // namespace
}  // namespace qcompile::cpu

#endif  // QCOMPILE_CPU_ISA_CACHE_CODEC_H_
