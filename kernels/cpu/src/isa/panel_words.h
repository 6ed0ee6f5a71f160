// How linear_panel.h multiplies with AVX2, whose products of bytes are added in pairs of 16 bits.
//
// That instruction saturates, so codes stay as they are, small and without a sign, times
// activations with one. As many pairs as cannot overflow are added before they are widened: 8 at 4
// bits, that is a group of 32. A sum of 4 products thus costs 2 instructions and a bit; widened at
// once, 3.
//
// Not one pair of 8 bits fits: these codes are widened before, less their zero points, at 4
// instructions for a sum of 4.
#ifndef QCOMPILE_CPU_ISA_PANEL_WORDS_H_
#define QCOMPILE_CPU_ISA_PANEL_WORDS_H_

#include "panel_steps.h"

namespace qcompile::cpu {
namespace {

template <int kByteBits>
struct CodeDots {
  static constexpr int64_t kBytes = kQuadBytes;
  static constexpr int64_t kActivationBytes = kQuad;
  // Activations go down to -128.
  static constexpr int64_t kMostPairs = INT16_MAX / (2 * 128 * ((1 << kByteBits) - 1));
  static_assert(kMostPairs >= 1);

  static bool HasShifts(const PackedLayout&) { return true; }
  static I Base(const PackedLayout&, I) { return ZeroI(); }
  static void Store(uint8_t* to, Bytes codes, I, I*) { StoreQuad(to, codes); }
  static void PackFour(const int8_t* codes, uint8_t* to) { memcpy(to, codes, kQuad); }

  template <int kRows>
  QCOMPILE_ALWAYS_INLINE static void Add(const uint8_t* a, const uint8_t* bytes, int64_t quads,
                                         I (&dot)[kRows][kPanelBlocks]) {
    for (int64_t done = 0; done < quads; done += kMostPairs) {
      Words sum[kRows][kPanelBlocks];
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int b = 0; b < kPanelBlocks; ++b) sum[r][b] = ZeroWords();
      }
      AddSteps(a, bytes, Least(kMostPairs, quads - done), sum,
               [](Words* pairs, Bytes w, Bytes four)
                   __attribute__((always_inline)) { AddBytePairs(pairs, w, four); });
      a += kMostPairs * kPanelRows * kQuad;
      bytes += kMostPairs * kPanelBlocks * kQuadBytes;
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int b = 0; b < kPanelBlocks; ++b) dot[r][b] = dot[r][b] + Widen(sum[r][b]);
      }
    }
  }
};

// A quad is two steps of 16-bit pairs: k 0 and 2, then 1 and 3.
struct WordDots {
  static constexpr int64_t kBytes = 2 * kQuadBytes;
  static constexpr int64_t kActivationBytes = 2 * kQuad;

  static bool HasShifts(const PackedLayout&) { return false; }
  static I Base(const PackedLayout&, I zero) { return zero; }
  static void Store(uint8_t* to, Bytes codes, I zero, I*) {
    StoreQuad(to, EvenWords(codes, zero));
    StoreQuad(to + kPanelBlocks * kQuadBytes, OddWords(codes, zero));
  }
  static void PackFour(const int8_t* codes, uint8_t* to) {
    const int16_t words[] = {codes[0], codes[2], codes[1], codes[3]};
    memcpy(to, words, sizeof(int32_t));
    memcpy(to + kPanelRows * kQuad, words + 2, sizeof(int32_t));
  }

  template <int kRows>
  QCOMPILE_ALWAYS_INLINE static void Add(const uint8_t* a, const uint8_t* bytes, int64_t quads,
                                         I (&dot)[kRows][kPanelBlocks]) {
    AddSteps(a, bytes, 2 * quads, dot,
             [](I* sum, Bytes w, Bytes two)
                 __attribute__((always_inline)) { AddWordPairs(sum, w, two); });
  }
};
static_assert(kPanelBlocks == 1, "the two steps of a quad are stored as if there were one block");

template <int kByteBits>
struct PanelDotsFor {
  using Type = CodeDots<kByteBits>;
};
template <>
struct PanelDotsFor<8> {
  using Type = WordDots;
};

}  // namespace
}  // namespace qcompile::cpu

#endif  // QCOMPILE_CPU_ISA_PANEL_WORDS_H_
