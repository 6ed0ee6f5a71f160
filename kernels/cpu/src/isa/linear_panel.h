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

#include "unpack_panel.h"

namespace qcompile::cpu {
namespace {

constexpr int64_t kPanelRows = 12;
// By measurement on Zen 5: from here on groups of 32 gain, and groups of 128 lose no more than 5%.
constexpr int64_t kLeastPanelRows = 64;

// Integer activations of kPanelRows rows: codes + 128, [padded_k / 4][kPanelRows][4], then scales
// [scales_per_row][kPanelRows]. Past the last row anything may stand.
struct ActivationPanel {
  int64_t padded_k, scales_per_row;

  int64_t scales_at() const { return kPanelRows * padded_k; }
  int64_t bytes() const {
    return scales_at() + kPanelRows * scales_per_row * int64_t{sizeof(float)};
  }
};

inline ActivationPanel PanelOf(const LinearTile& t) {
  return {t.layout->padded_k(), t.scales_per_row};
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
      UnpackBlocks<Codes>(t, block, blocks, weights);
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

void LinearPanels(const LinearTile& t) { WithByteCodes<LinearPanelKernel>(t); }

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

const PanelKernels kPanelKernels = {
    kPanelRows,
    kLeastPanelRows,
    [](const PackedLayout& layout, int64_t scales_per_row) {
      return ActivationPanel{layout.padded_k(), scales_per_row}.bytes();
    },
    WeightPanel::Bytes,
    PackPanel,
    LinearPanels,
};

}  // namespace
}  // namespace qcompile::cpu

#endif  // QCOMPILE_CPU_ISA_LINEAR_PANEL_H_
