// Matrix products with int8 activations for many rows: codes are unpacked once, then used by all.
//
// A pass takes kPanelBlocks column blocks. Their codes become signed bytes w = code - zero point,
// [k / 4][blocks][16 columns][4 k], beside their scales; activations come in panels of kPanelRows
// rows, as unsigned bytes a + 128. The dot product of the two is 128 * sum(w) too large: that is
// what its accumulator starts below zero. Then 4 k of 12 rows and 32 columns are 2 loads of
// weights, 12 broadcasts and 24 dot products: an instruction for 40 products. A group adds a
// conversion, a product of scales and a multiply-add per output.
//
// The integers are those of LinearInt8Block, and the floats are added in its order: a row's result
// is the same bit for bit, however many rows there are.
#ifndef QCOMPILE_CPU_ISA_LINEAR_PANEL_H_
#define QCOMPILE_CPU_ISA_LINEAR_PANEL_H_

#include "linear.h"

namespace qcompile::cpu {
namespace {

// The weights of a pass, in the tile's scratch.
struct WeightPanel {
  float* scales;    // [groups][kPanelBlocks][16]
  int32_t* starts;  // the same
  uint8_t* bytes;   // [padded_k / 4][kPanelBlocks][64]

  static WeightPanel In(const LinearTile& t) {
    const int64_t heads = t.layout->groups() * kPanelBlocks * kColumns;
    auto* starts = reinterpret_cast<int32_t*>(t.scratch + heads);
    return {t.scratch, starts, reinterpret_cast<uint8_t*>(starts + heads)};
  }
};

inline ActivationPanel PanelOf(const LinearTile& t) {
  return {t.layout->padded_k(), t.scales_per_row};
}

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

// The first kRows rows of a panel of activations; `rows` of them are stored, from `row` on.
template <int kRows>
void MultiplyPanel(const LinearTile& t, const WeightPanel& weights, int64_t row, int64_t rows,
                   int64_t block, int64_t blocks) {
  const PackedLayout& layout = *t.layout;
  const ActivationPanel shape = PanelOf(t);
  const int64_t groups = layout.groups(), scale_step = t.scales_per_row == 1 ? 0 : kPanelRows;
  const uint8_t* a = t.panels + row / kPanelRows * shape.bytes();
  const auto* scales = reinterpret_cast<const float*>(a + shape.scales_at());
  const int32_t* starts = weights.starts;
  const float* weight_scales = weights.scales;
  const uint8_t* bytes = weights.bytes;

  alignas(64) float totals[kRows * kPanelBlocks * kColumns];
  for (int64_t g = 0; g < groups; ++g) {
    I dot[kRows][kPanelBlocks];
#pragma GCC unroll 4
    for (int b = 0; b < kPanelBlocks; ++b, starts += kColumns) {
      const I start = LoadInts(starts);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) dot[r][b] = start;
    }
    const int64_t quads = layout.group_units(g) * (kUnit / kQuad);
    for (int64_t q = 0; q < quads; ++q) {
      Bytes w[kPanelBlocks];
#pragma GCC unroll 4
      for (int b = 0; b < kPanelBlocks; ++b) w[b] = LoadQuad(bytes + b * kQuadBytes);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const Bytes four = BroadcastFour(a + r * kQuad);
#pragma GCC unroll 4
        for (int b = 0; b < kPanelBlocks; ++b) DotAccumulate(&dot[r][b], four, w[b]);
      }
      bytes += kPanelBlocks * kQuadBytes;
      a += kPanelRows * kQuad;
    }
    const int64_t lanes = g == 0 ? 0 : kColumns;  // at first there are no totals
#pragma GCC unroll 4
    for (int b = 0; b < kPanelBlocks; ++b, weight_scales += kColumns) {
      const F weight_scale = Load(weight_scales);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        float* total = totals + (r * kPanelBlocks + b) * kColumns;
        const F scale = weight_scale * Set1(scales[r]);
        Store(total, Fma(ToFloat(dot[r][b]), scale, LoadN(total, lanes)));
      }
    }
    scales += scale_step;
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t b = 0; b < blocks; ++b) {
      StoreResult(t, row + r, block + b, Load(totals + (r * kPanelBlocks + b) * kColumns));
    }
  }
}

struct LinearPanelKernel {
  template <class Codes>
  static void Run(const LinearTile& t) {
    const WeightPanel weights = WeightPanel::In(t);
    for (int64_t block = t.block_begin; block < t.block_end; block += kPanelBlocks) {
      const int64_t blocks = Least(kPanelBlocks, t.block_end - block);
      for (int64_t b = 0; b < kPanelBlocks; ++b) {
        // Where there is no second block, the first takes its place.
        UnpackBlock<Codes>(t, block + Least(b, blocks - 1), b, weights);
      }
      for (int64_t row = t.row_begin; row < t.row_end; row += kPanelRows) {
        const int64_t rows = Least(kPanelRows, t.row_end - row);
        if (rows <= 4) {
          MultiplyPanel<4>(t, weights, row, rows, block, blocks);
        } else if (rows <= 8) {
          MultiplyPanel<8>(t, weights, row, rows, block, blocks);
        } else {
          MultiplyPanel<kPanelRows>(t, weights, row, rows, block, blocks);
        }
      }
    }
  }
};

void LinearPanels(const LinearTile& t) {
  switch (t.layout->coding) {
    case Coding::kE2m1:
      return LinearPanelKernel::Run<E2m1Codes>(t);
    case Coding::kTernary:
      return LinearPanelKernel::Run<TernaryCodes>(t);
    default:  // the operator refuses others
      return WithIntegers<LinearPanelKernel>(t);
  }
}

void PackPanel(const LinearTile& t, uint8_t* panel) {
  const ActivationPanel shape = PanelOf(t);
  auto* scales = reinterpret_cast<float*>(panel + shape.scales_at());
  for (int64_t row = t.row_begin, r = 0; row < t.row_end; ++row, ++r) {
    const int8_t* codes = t.codes + row * shape.padded_k;
    for (int64_t k = 0; k < shape.padded_k; k += kQuad) {
      uint32_t four;
      memcpy(&four, codes + k, sizeof(four));
      four ^= 0x80808080u;  // + 128 in every byte
      memcpy(panel + k * kPanelRows + r * kQuad, &four, sizeof(four));
    }
    for (int64_t g = 0; g < shape.scales_per_row; ++g) {
      scales[g * kPanelRows + r] = t.scales[row * shape.scales_per_row + g];
    }
  }
}

}  // namespace
}  // namespace qcompile::cpu

#endif  // QCOMPILE_CPU_ISA_LINEAR_PANEL_H_
