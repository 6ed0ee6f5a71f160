// How linear_panel.h multiplies where an instruction adds four products of bytes to each lane.
//
// It takes one factor without and one with a sign: activations become a + 128, and what that adds
// to the sums is taken off where they start.
#ifndef QCOMPILE_CPU_ISA_PANEL_DOTS_H_
#define QCOMPILE_CPU_ISA_PANEL_DOTS_H_

#include "panel_steps.h"

namespace qcompile::cpu {
namespace {

template <int kByteBits>
struct ByteDots : CentredBytes {
  static constexpr int64_t kActivationBytes = kQuad;

  static bool HasShifts(const PackedLayout& layout) {
    return kByteBits == 8 && CentredBytes::HasShifts(layout);
  }

  static void PackFour(const int8_t* codes, uint8_t* to) {
    uint32_t four;
    memcpy(&four, codes, sizeof(four));
    four ^= 0x80808080u;  // + 128 in every byte
    memcpy(to, &four, sizeof(four));
  }

  template <int kRows>
  QCOMPILE_ALWAYS_INLINE static void Add(const uint8_t* a, const uint8_t* bytes, int64_t quads,
                                         I (&dot)[kRows][kPanelBlocks]) {
    AddSteps(a, bytes, quads, dot, [](I* sum, Bytes w, Bytes four) __attribute__((always_inline)) {
      DotAccumulate(sum, four, w);
    });
  }
};

template <int kByteBits>
struct PanelDotsFor {
  using Type = ByteDots<7>;  // for all that are shorter than 8
};
template <>
struct PanelDotsFor<8> {
  using Type = ByteDots<8>;
};

}  // namespace
}  // namespace qcompile::cpu

#endif  // QCOMPILE_CPU_ISA_PANEL_DOTS_H_
