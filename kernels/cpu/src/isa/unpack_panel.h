// Weights of some columns as signed bytes, for products that use them for many rows.
#ifndef QCOMPILE_CPU_ISA_UNPACK_PANEL_H_
#define QCOMPILE_CPU_ISA_UNPACK_PANEL_H_

#include "linear.h"

namespace qcompile::cpu {
namespace {

constexpr int64_t kPanelBlocks = 2;  // column blocks whose codes are unpacked at a time

// The weights of a pass, in the tile's scratch.
struct WeightPanel {
  float* scales;    // [groups][kPanelBlocks][16]
  int32_t* starts;  // the same: -128 times the sum of a group's bytes
  uint8_t* bytes;   // [padded_k / 4][kPanelBlocks][64]: code - zero point

  static WeightPanel In(const LinearTile& t) {
    const int64_t heads = t.layout->groups() * kPanelBlocks * kColumns;
    auto* starts = reinterpret_cast<int32_t*>(t.scratch + heads);
    return {t.scratch, starts, reinterpret_cast<uint8_t*>(starts + heads)};
  }
  static int64_t Bytes(const PackedLayout& layout) {
    constexpr int64_t kHeadBytes = sizeof(float) + sizeof(int32_t);
    return kPanelBlocks * kColumns * (layout.groups() * kHeadBytes + layout.padded_k());
  }
};

template <class Codes>
void UnpackBlock(const LinearTile& t, int64_t block, int64_t place, const WeightPanel& panel) {
  const Codes coding(t);
  const PackedLayout& layout = *t.layout;
  const uint8_t* header = t.weight + layout.block_at(block);
  constexpr uint8_t kOffset[kQuad] = {128, 128, 128, 128};
  const Bytes offset = BroadcastFour(kOffset);
  uint8_t* bytes = panel.bytes + place * kQuadBytes;
  for (int64_t g = 0; g < layout.groups(); ++g) {
    const int64_t at = (g * kPanelBlocks + place) * kColumns;
    F scale = ReadScales(t, header, block);
    if constexpr (Codes::kStep != 1.0f) scale = scale * Set1(Codes::kStep);
    Store(panel.scales + at, scale);
    const I zero = coding.Zero(coding.ReadGroup(layout, header));
    const int64_t units = layout.group_units(g), quads = units * (kUnit / kQuad);
    I too_much = ZeroI();
    Codes::template ForEachQuad<1>(header + layout.header_bytes(), 0, {0, quads, quads},
                                   [&](const Bytes* quad, auto) __attribute__((always_inline)) {
                                     const Bytes w = Subtract(coding.ToBytes(*quad), zero);
                                     DotAccumulate(&too_much, offset, w);
                                     StoreQuad(bytes, w);
                                     bytes += kPanelBlocks * kQuadBytes;
                                   });
    StoreInts(panel.starts + at, ZeroI() - too_much);
    header += layout.header_bytes() + layout.code_bytes(units);
  }
}

// `blocks` of kPanelBlocks blocks. Where there is no second block, the first takes its place.
template <class Codes>
void UnpackBlocks(const LinearTile& t, int64_t block, int64_t blocks, const WeightPanel& panel) {
  for (int64_t b = 0; b < kPanelBlocks; ++b) {
    UnpackBlock<Codes>(t, block + Least(b, blocks - 1), b, panel);
  }
}

}  // namespace
}  // namespace qcompile::cpu

#endif  // QCOMPILE_CPU_ISA_UNPACK_PANEL_H_
