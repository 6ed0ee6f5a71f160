// Weights of some columns as bytes, for products that use them for many rows.
//
// Whatever the bytes of a quad stand for, the dot product of a group is
//
//   sum of (code - zero point) * a = start + shift * sum of a + sum of byte * a'
//
// where a' is what the kernel multiplies for an activation a; FloatSum takes off what float zero
// points are above the middle code. A class says how bytes are made:
//
//   kBytes                       of a quad
//   HasShifts(layout)            whether a shift can be other than 0
//   Base(layout, zero)           what is taken from codes with these zero points
//   Store(to, codes, base, sum)  makes the bytes, and adds to `sum` what the sum must start below 0
#ifndef QCOMPILE_CPU_ISA_UNPACK_PANEL_H_
#define QCOMPILE_CPU_ISA_UNPACK_PANEL_H_

#include "linear.h"

namespace qcompile::cpu {
namespace {

// The weights of a pass over kPanelBlocks column blocks, in the tile's scratch.
struct WeightPanel {
  float* scales;    // [groups][kPanelBlocks][16]
  int32_t* starts;  // the same
  int32_t* shifts;  // the same
  float* rests;     // the same, where zero points are floats
  uint8_t* bytes;   // [padded_k / 4][kPanelBlocks][quad_bytes]

  static WeightPanel In(const LinearTile& t) {
    const int64_t heads = t.layout->groups() * kPanelBlocks * kColumns;
    auto* starts = reinterpret_cast<int32_t*>(t.scratch + heads);
    int32_t* shifts = starts + heads;
    auto* rests = reinterpret_cast<float*>(shifts + heads);
    float* end = rests + (t.layout->float_zero_point ? heads : 0);
    return {t.scratch, starts, shifts, rests, reinterpret_cast<uint8_t*>(end)};
  }
  static int64_t Bytes(const PackedLayout& layout, int64_t quad_bytes) {
    const int64_t numbers = layout.float_zero_point ? 4 : 3;  // of 4 bytes each
    const int64_t head_bytes = kColumns * numbers * int64_t{sizeof(float)};
    return kPanelBlocks * (layout.groups() * head_bytes + layout.padded_k() / kQuad * quad_bytes);
  }
};

// Signed bytes: codes less their zero point, or less 128 where that does not fit.
struct CentredBytes {
  static constexpr int64_t kBytes = kQuadBytes;

  static bool HasShifts(const PackedLayout& layout) {
    return layout.bits == 8 && layout.has_zero_point;
  }
  static I Base(const PackedLayout& layout, I zero) { return HasShifts(layout) ? Set1(128) : zero; }
  // For products with a + 128.
  static void Store(uint8_t* to, Bytes codes, I base, I* sum) {
    constexpr uint8_t kOffset[kQuad] = {128, 128, 128, 128};
    const Bytes bytes = Subtract(codes, base);
    DotAccumulate(sum, BroadcastFour(kOffset), bytes);
    StoreQuad(to, bytes);
  }
};

template <class Codes, class Form>
void UnpackBlock(const LinearTile& t, int64_t block, int64_t place, const WeightPanel& panel) {
  const Codes coding(t);
  const PackedLayout& layout = *t.layout;
  const uint8_t* header = t.weight + layout.block_at(block);
  uint8_t* bytes = panel.bytes + place * Form::kBytes;
  for (int64_t g = 0; g < layout.groups(); ++g) {
    const int64_t at = (g * kPanelBlocks + place) * kColumns;
    F scale = ReadScales(t, header, block);
    if constexpr (Codes::kStep != 1.0f) scale = scale * Set1(Codes::kStep);
    Store(panel.scales + at, scale);
    const I zero = coding.Zero(coding.ReadGroup(layout, header));
    const I base = Form::Base(layout, zero);
    const int64_t units = layout.group_units(g), quads = units * (kUnit / kQuad);
    I too_much = ZeroI();
    Codes::template ForEachQuad<1>(header + layout.header_bytes(), 0, {0, quads, quads},
                                   [&](const Bytes* quad, auto) __attribute__((always_inline)) {
                                     Form::Store(bytes, coding.ToBytes(*quad), base, &too_much);
                                     bytes += kPanelBlocks * Form::kBytes;
                                   });
    StoreInts(panel.starts + at, ZeroI() - too_much);
    StoreInts(panel.shifts + at, base - zero);
    if (layout.float_zero_point) Store(panel.rests + at, ReadZeroRests(layout, header));
    header += layout.header_bytes() + layout.code_bytes(units);
  }
}

// `blocks` of kPanelBlocks blocks. Where there is no second block, the first takes its place.
template <class Codes, class Form>
void UnpackBlocks(const LinearTile& t, int64_t block, int64_t blocks, const WeightPanel& panel) {
  for (int64_t b = 0; b < kPanelBlocks; ++b) {
    UnpackBlock<Codes, Form>(t, block + Least(b, blocks - 1), b, panel);
  }
}

}  // namespace
}  // namespace qcompile::cpu

#endif  // QCOMPILE_CPU_ISA_UNPACK_PANEL_H_
