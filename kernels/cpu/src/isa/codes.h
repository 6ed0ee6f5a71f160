// How packed codes become numbers: one class per coding, with which the products are instantiated.
//
// Codes come in quads, 4 consecutive k of 16 columns. A class has
//
//   ForEachQuad<kBlocks>   reads quads of a group in kBlocks column blocks and hands them on
//   ReadGroup              what the head of a group says about its codes
//   Value<kByte>           the floats of one k of a quad
//
// and, where a product of bytes can take its codes (kHasBytes), also
//
//   ToBytes, Zero, kStep   the value is (byte - Zero) * kStep, bytes have kByteBits bits; but where
//                          zero points are floats, Zero is the middle code, and FloatSum (linear.h)
//                          takes off what is left
//   DotWhole               one row's products with the first quads of a group, if they need not be
//                          taken apart for them (kDotsWhole)
#ifndef QCOMPILE_CPU_ISA_CODES_H_
#define QCOMPILE_CPU_ISA_CODES_H_

#include <cstring>

#include "kernel_table.h"

namespace qcompile::cpu {
namespace {

// How far ahead of the codes in use the next ones are asked for, in bytes. Far enough to run into
// the column blocks that follow: short rows of codes would else begin with a wait for memory.
constexpr int64_t kPrefetch = 12288;

// A number that is known when the program is compiled.
template <int kNumber>
struct Constant {
  static constexpr int value = kNumber;
};

inline int32_t LoadFour(const int8_t* codes) {
  int32_t four;
  memcpy(&four, codes, sizeof(four));
  return four;
}

// Quads `begin` to `end` of a group that has `total`.
struct QuadRange {
  int64_t begin, end, total;
};

// One unit of codes: 8 consecutive k of 16 columns. The planes are the binary digits of kBits, and
// each begins where those before it end: in the codes, and, 16 times as far, in the unit.
template <int kBits>
inline void Unpack(const uint8_t* p, Bytes* first, Bytes* second) {
  static_assert(kBits >= 1 && kBits <= 8);
  if constexpr ((kBits & 8) != 0) ReadPlane<8, 0>(p, first, second);
  if constexpr ((kBits & 4) != 0) ReadPlane<4, 0>(p, first, second);
  if constexpr ((kBits & 2) != 0) {
    constexpr int kBefore = kBits & 4;
    ReadPlane<2, kBefore>(p + kColumns * kBefore, first, second);
  }
  if constexpr ((kBits & 1) != 0) {
    constexpr int kBefore = kBits & 6;
    ReadPlane<1, kBefore>(p + kColumns * kBefore, first, second);
  }
}

// Codes in bit planes.
template <int kBits>
struct PlaneCodes {
  // Calls body(quads of kBlocks blocks `stride` bytes apart, parity of the quad). Begin and end are
  // even.
  template <int kBlocks, class Body>
  QCOMPILE_ALWAYS_INLINE static void ForEachQuad(const uint8_t* codes, int64_t stride,
                                                 QuadRange range, Body body) {
    constexpr int64_t kUnitBytes = kColumns * kBits, kUnitQuads = kUnit / kQuad;
    const uint8_t* p = codes + range.begin / kUnitQuads * kUnitBytes;
    for (int64_t q = range.begin; q < range.end; q += kUnitQuads, p += kUnitBytes) {
      Bytes first[kBlocks], second[kBlocks];
#pragma GCC unroll 4
      for (int b = 0; b < kBlocks; ++b) {
        Unpack<kBits>(p + b * stride, &first[b], &second[b]);
        for (int64_t line = 0; line < kUnitBytes; line += 64) {
          __builtin_prefetch(p + b * stride + line + kPrefetch);
        }
      }
      body(first, Constant<0>());
      body(second, Constant<1>());
    }
  }
};

// The zero points of a group that are no whole numbers.
inline F ReadFloatZeros(const PackedLayout& layout, const uint8_t* header) {
  return LoadHalf(header + layout.scale_bytes());
}

// Without anything to read at the head of a group.
struct NoGroup {};

template <int kBits>
struct IntegerCodes : PlaneCodes<kBits> {
  static constexpr bool kHasBytes = true, kDotsWhole = false;
  static constexpr int kByteBits = kBits;
  static constexpr float kStep = 1.0f;
  // Zero points, and what is taken for them where whole numbers are summed up.
  struct Group {
    F zero;
    I whole;
  };

  explicit IntegerCodes(const LinearTile&) {}
  Group ReadGroup(const PackedLayout& layout, const uint8_t* header) const {
    if (layout.float_zero_point) return {ReadFloatZeros(layout, header), Set1(kMiddle)};
    const I whole =
        layout.has_zero_point ? LoadBytesAsInts(header + layout.scale_bytes()) : Set1(kMiddle);
    return {ToFloat(whole), whole};
  }
  Bytes ToBytes(Bytes quad) const { return quad; }
  I Zero(const Group& group) const { return group.whole; }
  template <int kByte>
  F Value(Bytes quad, const Group& group) const {
    return ToFloat(ExtractByte<kByte>(quad)) - group.zero;
  }

  static constexpr int kMiddle = 1 << (kBits - 1);
};

struct E2m1Codes : PlaneCodes<4> {
  static constexpr bool kHasBytes = true, kDotsWhole = false;
  static constexpr int kByteBits = 5;
  static constexpr float kStep = kE2m1Step;
  using Group = NoGroup;

  explicit E2m1Codes(const LinearTile&)
      : levels(LoadFloatTable(kE2m1Levels)), steps(LoadByteTable(kE2m1Steps)) {}
  Group ReadGroup(const PackedLayout&, const uint8_t*) const { return {}; }
  Bytes ToBytes(Bytes quad) const { return LookUp(steps, quad); }
  I Zero(Group) const { return Set1(kE2m1ZeroStep); }
  template <int kByte>
  F Value(Bytes quad, Group) const {
    return LookUp<kByte>(levels, quad);
  }

  FloatTable levels;
  ByteTable steps;
};

struct E4m3Codes : PlaneCodes<8> {
  static constexpr bool kHasBytes = false;
  using Group = NoGroup;

  explicit E4m3Codes(const LinearTile&) {}
  Group ReadGroup(const PackedLayout&, const uint8_t*) const { return {}; }
  template <int kByte>
  F Value(Bytes quad, Group) const {
    return DecodeE4m3<kByte>(quad);
  }
};

// Up to 16 levels stay in registers, more are gathered from memory.
template <int kBits, bool kInRegisters = (kBits <= 4)>
struct TableCodes : PlaneCodes<kBits> {
  static constexpr bool kHasBytes = false;
  using Group = NoGroup;

  explicit TableCodes(const LinearTile& t) {
    float first[16];
    memcpy(first, t.weight, sizeof(first));
    levels = LoadFloatTable(first);
  }
  Group ReadGroup(const PackedLayout&, const uint8_t*) const { return {}; }
  template <int kByte>
  F Value(Bytes quad, Group) const {
    return LookUp<kByte>(levels, quad);
  }

  FloatTable levels;
};

template <int kBits>
struct TableCodes<kBits, false> : PlaneCodes<kBits> {
  static constexpr bool kHasBytes = false;
  using Group = NoGroup;

  // The weight may stand at any address.
  explicit TableCodes(const LinearTile& t) { memcpy(levels, t.weight, sizeof(levels)); }
  Group ReadGroup(const PackedLayout&, const uint8_t*) const { return {}; }
  template <int kByte>
  F Value(Bytes quad, Group) const {
    return LookUpInMemory<kByte>(levels, quad);
  }

  float levels[1 << kBits];
};

struct TernaryCodes {
  static constexpr bool kHasBytes = true, kDotsWhole = kFractionChains > 0;
  static constexpr int kByteBits = 2;
  static constexpr float kStep = 1.0f;
  using Group = NoGroup;

  explicit TernaryCodes(const LinearTile&) : levels(LoadFloatTable(kTernaryLevels)) {}
  Group ReadGroup(const PackedLayout&, const uint8_t*) const { return {}; }
  Bytes ToBytes(Bytes quad) const { return quad; }
  I Zero(Group) const { return Set1(kTernaryZero); }
  template <int kByte>
  F Value(Bytes quad, Group) const {
    return LookUp<kByte>(levels, quad);
  }

  template <int kBlocks, class Body>
  QCOMPILE_ALWAYS_INLINE static void ForEachQuad(const uint8_t* codes, int64_t stride,
                                                 QuadRange range, Body body) {
    const int64_t whole = range.total / kTrits * kTrits;
    int64_t q = range.begin;
    while (q < range.end && q < whole) {
      const uint8_t* p = codes + q / kTrits * kQuadBytes;
      Bytes rest[kBlocks];
#pragma GCC unroll 4
      for (int b = 0; b < kBlocks; ++b) {
        rest[b] = LoadQuad(p + b * stride);
        __builtin_prefetch(p + b * stride + kPrefetch);
      }
      if (q % kTrits == 0 && q + kTrits <= range.end) {
        GiveDigit<kBlocks, 0>(rest, body);
        GiveDigit<kBlocks, 1>(rest, body);
        GiveDigit<kBlocks, 0>(rest, body);
        GiveDigit<kBlocks, 1>(rest, body);
        GiveDigit<kBlocks, 0>(rest, body);
        q += kTrits;
        continue;
      }
      for (int64_t skipped = 0; skipped < q % kTrits; ++skipped) {
        for (int b = 0; b < kBlocks; ++b) rest[b] = NextDigits(rest[b]);
      }
      const int64_t stop = Least(range.end, (q / kTrits + 1) * kTrits);
      for (; q < stop; ++q) GiveDigit<kBlocks, 0>(rest, body);
    }
    const uint8_t* leftovers = codes + whole / kTrits * kQuadBytes;
    for (; q < range.end; ++q) {
      Bytes quad[kBlocks];
      for (int b = 0; b < kBlocks; ++b) {
        quad[b] = LoadLeftoverQuad(leftovers + b * stride + (q - whole) * kLeftoverQuadBytes);
      }
      body(quad, Constant<1>());
    }
  }

  // Adds the products of activations `a` with the first quads of a group; how many these are.
  //
  // A byte's fraction x[i] holds the digits d[i], d[i+1], ...: 3 x[i] = 256 d[i] + x[i+1]. So the
  // sum of a[i] d[i] is that of 3 a[i] x[i] - a[i] x[i+1], through 256, and no digit is ever needed
  // by itself. These sums may leave 32 bits, but what 256 leaves of their 32 bits is right as long
  // as it fits 24.
  QCOMPILE_ALWAYS_INLINE static int64_t DotWhole(const uint8_t* codes, int64_t quads,
                                                 const int8_t* a, I* sum) {
    constexpr int64_t kMostQuads = (1 << 23) / (kQuad * 2 * 128);
    if (quads > kMostQuads) return 0;
    const int64_t whole = quads / kTrits * kTrits;
    constexpr int kChains = kFractionChains > 0 ? kFractionChains : 1;
    I now[kChains], next[kChains];
    for (int i = 0; i < kChains; ++i) now[i] = next[i] = ZeroI();
    for (int64_t q = 0; q < whole; q += kTrits, codes += kQuadBytes) {
      Bytes x = LoadQuad(codes);
      __builtin_prefetch(codes + kPrefetch);
#pragma GCC unroll 5
      for (int i = 0; i < kTrits; ++i, a += kQuad) {
        const int32_t four = LoadFour(a);
        I& now_sum = now[i % kChains];
        I& next_sum = next[i % kChains];
        now_sum = DotAccumulate<8>(now_sum, x, four);
        x = NextDigits(x);
        next_sum = DotAccumulate<8>(next_sum, x, four);
      }
    }
    for (int i = 1; i < kChains; ++i) {
      now[0] = now[0] + now[i];
      next[0] = next[0] + next[i];
    }
    *sum = *sum + ShiftRightSigned<8>(now[0] * Set1(3) - next[0]);
    return whole;
  }

  template <int kBlocks, int kParity, class Body>
  QCOMPILE_ALWAYS_INLINE static void GiveDigit(Bytes* rest, Body body) {
    Bytes quad[kBlocks];
#pragma GCC unroll 4
    for (int b = 0; b < kBlocks; ++b) {
      quad[b] = FirstDigit(rest[b]);
      rest[b] = NextDigits(rest[b]);
    }
    body(quad, Constant<kParity>());
  }

  FloatTable levels;
};

// Runs Kernel::Run<Codes>(t) with the class of the weight's coding.
template <class Kernel>
inline void WithIntegers(const LinearTile& t) {
  switch (t.layout->bits) {
    case 1:
      return Kernel::template Run<IntegerCodes<1>>(t);
    case 2:
      return Kernel::template Run<IntegerCodes<2>>(t);
    case 3:
      return Kernel::template Run<IntegerCodes<3>>(t);
    case 4:
      return Kernel::template Run<IntegerCodes<4>>(t);
    case 5:
      return Kernel::template Run<IntegerCodes<5>>(t);
    case 6:
      return Kernel::template Run<IntegerCodes<6>>(t);
    case 7:
      return Kernel::template Run<IntegerCodes<7>>(t);
    default:
      return Kernel::template Run<IntegerCodes<8>>(t);
  }
}

template <class Kernel>
inline void WithTable(const LinearTile& t) {
  switch (t.layout->bits) {
    case 1:
      return Kernel::template Run<TableCodes<1>>(t);
    case 2:
      return Kernel::template Run<TableCodes<2>>(t);
    case 3:
      return Kernel::template Run<TableCodes<3>>(t);
    case 4:
      return Kernel::template Run<TableCodes<4>>(t);
    case 5:
      return Kernel::template Run<TableCodes<5>>(t);
    case 6:
      return Kernel::template Run<TableCodes<6>>(t);
    case 7:
      return Kernel::template Run<TableCodes<7>>(t);
    default:
      return Kernel::template Run<TableCodes<8>>(t);
  }
}

}  // namespace
}  // namespace qcompile::cpu

#endif  // QCOMPILE_CPU_ISA_CODES_H_
