// Matrix products with int8 activations for many rows: codes are unpacked once, then used by all.
//
// A pass takes kPanelBlocks column blocks. Their codes become bytes (unpack_panel.h), [k / 4]
// [blocks][16 columns][4 k], beside their scales; activations come in panels of kPanelRows rows.
// The sums of a group stay in registers: with AVX-512, 4 k of 12 rows and 32 columns are 2 loads of
// weights, 12 broadcasts and 24 dot products, an instruction for 40 products. A group adds a
// conversion, a product of scales and a multiply-add per output.
//
// The integers are those of LinearInt8Block, and the floats are added in its order: a row's result
// is the same bit for bit, however many rows there are.
//
// Comes after one of panel_dots.h and panel_words.h, of which PanelDotsFor says how bytes are
// multiplied.
#ifndef QCOMPILE_CPU_ISA_LINEAR_PANEL_H_
#define QCOMPILE_CPU_ISA_LINEAR_PANEL_H_

#include "unpack_panel.h"

namespace qcompile::cpu {
namespace {

// Integer activations of kPanelRows rows: [padded_k / 4][kPanelRows] times `quad_bytes`, then
// scales [scales_per_row][kPanelRows]. Past the last row anything may stand.
struct ActivationPanel {
  int64_t padded_k, scales_per_row, quad_bytes;

  int64_t scales_at() const { return kPanelRows * (padded_k / kQuad) * quad_bytes; }
  int64_t bytes() const {
    return scales_at() + kPanelRows * scales_per_row * int64_t{sizeof(float)};
  }
};

template <class Dots>
ActivationPanel PanelOf(const LinearTile& t) {
  return {t.layout->padded_k(), t.scales_per_row, Dots::kActivationBytes};
}

// The first kRows rows of a panel of activations; `rows` of them are stored, from `row` on.
template <class Dots, int kRows>
void MultiplyPanel(const LinearTile& t, const WeightPanel& weights, int64_t row, int64_t rows,
                   int64_t block, int64_t blocks) {
  const PackedLayout& layout = *t.layout;
  const ActivationPanel shape = PanelOf<Dots>(t);
  const int64_t groups = layout.groups(), scale_step = t.scales_per_row == 1 ? 0 : kPanelRows;
  const uint8_t* a = t.panels + row / kPanelRows * shape.bytes();
  const auto* scales = reinterpret_cast<const float*>(a + shape.scales_at());
  const int32_t* starts = weights.starts;
  const float* weight_scales = weights.scales;
  const uint8_t* bytes = weights.bytes;
  const bool shifted = Dots::HasShifts(layout), has_rest = layout.float_zero_point;

  alignas(64) float totals[kRows * kPanelBlocks * kColumns];
  for (int64_t g = 0; g < groups; ++g) {
    I dot[kRows][kPanelBlocks];
#pragma GCC unroll 4
    for (int b = 0; b < kPanelBlocks; ++b, starts += kColumns) {
      const I start = LoadInts(starts);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) dot[r][b] = start;
    }
    const auto sum_of = [&](int r) { return t.sums[(row + Least(r, rows - 1)) * groups + g]; };
    if (shifted) {
      const int32_t* shifts = weights.shifts + g * kPanelBlocks * kColumns;
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const I sum = Set1(sum_of(r));
#pragma GCC unroll 4
        for (int b = 0; b < kPanelBlocks; ++b) {
          dot[r][b] = dot[r][b] + LoadInts(shifts + b * kColumns) * sum;
        }
      }
    }
    const int64_t quads = layout.group_units(g) * (kUnit / kQuad);
    Dots::Add(a, bytes, quads, dot);
    a += quads * kPanelRows * Dots::kActivationBytes;
    bytes += quads * kPanelBlocks * Dots::kBytes;
    const int64_t lanes = g == 0 ? 0 : kColumns;  // at first there are no totals
#pragma GCC unroll 4
    for (int b = 0; b < kPanelBlocks; ++b, weight_scales += kColumns) {
      const F weight_scale = Load(weight_scales);
      const F rest = has_rest ? Load(weights.rests + (g * kPanelBlocks + b) * kColumns) : Zero();
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        float* total = totals + (r * kPanelBlocks + b) * kColumns;
        const F scale = weight_scale * Set1(scales[r]);
        const F product = FloatSum(dot[r][b], has_rest, rest, has_rest ? sum_of(r) : 0);
        Store(total, Fma(product, scale, LoadN(total, lanes)));
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
    using Dots = typename PanelDotsFor<Codes::kByteBits>::Type;
    constexpr int kThird = kPanelRows / 3;
    const WeightPanel weights = WeightPanel::In(t);
    for (int64_t block = t.block_begin; block < t.block_end; block += kPanelBlocks) {
      const int64_t blocks = Least(kPanelBlocks, t.block_end - block);
      UnpackBlocks<Codes, Dots>(t, block, blocks, weights);
      for (int64_t row = t.row_begin; row < t.row_end; row += kPanelRows) {
        const int64_t rows = Least(kPanelRows, t.row_end - row);
        if (rows <= kThird) {
          MultiplyPanel<Dots, kThird>(t, weights, row, rows, block, blocks);
        } else if (rows <= 2 * kThird) {
          MultiplyPanel<Dots, 2 * kThird>(t, weights, row, rows, block, blocks);
        } else {
          MultiplyPanel<Dots, kPanelRows>(t, weights, row, rows, block, blocks);
        }
      }
    }
  }
};

void LinearPanels(const LinearTile& t) { WithByteCodes<LinearPanelKernel>(t); }

template <class Dots>
void PackRows(const LinearTile& t, uint8_t* panel) {
  const ActivationPanel shape = PanelOf<Dots>(t);
  auto* scales = reinterpret_cast<float*>(panel + shape.scales_at());
  for (int64_t row = t.row_begin, r = 0; row < t.row_end; ++row, ++r) {
    const int8_t* codes = t.codes + row * shape.padded_k;
    uint8_t* to = panel + r * kQuad;
    for (int64_t k = 0; k < shape.padded_k; k += kQuad) {
      Dots::PackFour(codes + k, to);
      to += kPanelRows * Dots::kActivationBytes;
    }
    for (int64_t g = 0; g < shape.scales_per_row; ++g) {
      scales[g * kPanelRows + r] = t.scales[row * shape.scales_per_row + g];
    }
  }
}

// Activations for codes of less than 8 bits are all alike.
using NarrowDots = PanelDotsFor<4>::Type;
using WideDots = PanelDotsFor<8>::Type;

const PanelKernels kPanelKernels = {
    kPanelRows,
    kLeastPanelRows,
    0,
    [](const PackedLayout& layout, int64_t scales_per_row) {
      const bool wide = layout.bits == 8;
      const int64_t quad_bytes = wide ? WideDots::kActivationBytes : NarrowDots::kActivationBytes;
      return ActivationPanel{layout.padded_k(), scales_per_row, quad_bytes}.bytes();
    },
    [](const PackedLayout& layout) {
      return WeightPanel::Bytes(layout, layout.bits == 8 ? WideDots::kBytes : NarrowDots::kBytes);
    },
    [](const LinearTile& t, uint8_t* panel) {
      return t.layout->bits == 8 ? PackRows<WideDots>(t, panel) : PackRows<NarrowDots>(t, panel);
    },
    LinearPanels,
};

}  // namespace
}  // namespace qcompile::cpu

#endif  // QCOMPILE_CPU_ISA_LINEAR_PANEL_H_
