// The innermost loop of linear_panel.h, whatever the products of bytes are.
#ifndef QCOMPILE_CPU_ISA_PANEL_STEPS_H_
#define QCOMPILE_CPU_ISA_PANEL_STEPS_H_

#include "unpack_panel.h"

namespace qcompile::cpu {
namespace {

// In each step 64 bytes of every column block meet 4 bytes of every row.
template <int kRows, class Sum, class Multiply>
QCOMPILE_ALWAYS_INLINE void AddSteps(const uint8_t* a, const uint8_t* bytes, int64_t steps,
                                     Sum (&sum)[kRows][kPanelBlocks], Multiply multiply) {
  for (int64_t s = 0; s < steps; ++s) {
    Bytes w[kPanelBlocks];
#pragma GCC unroll 4
    for (int b = 0; b < kPanelBlocks; ++b) w[b] = LoadQuad(bytes + b * kQuadBytes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Bytes four = BroadcastFour(a + r * kQuad);
#pragma GCC unroll 4
      for (int b = 0; b < kPanelBlocks; ++b) multiply(&sum[r][b], w[b], four);
    }
    bytes += kPanelBlocks * kQuadBytes;
    a += kPanelRows * kQuad;
  }
}

}  // namespace
}  // namespace qcompile::cpu

#endif  // QCOMPILE_CPU_ISA_PANEL_STEPS_H_
