// Matrix products with int8 activations for many rows on a matrix unit with tile registers.
//
// A pass takes kPanelBlocks column blocks, whose codes become signed bytes (unpack_panel.h): 16
// consecutive quads of a block are a tile of 64 k by 16 columns as they stand. Activations come in
// panels of 32 rows, two tiles. Tiles have one size only, as their configuration belongs to the
// whole thread and others use the unit, too: where a group ends within a tile, activations are
// padded with zeros, and what the tile of weights has there is multiplied by them.
//
// The sums of a group are whole numbers, and are scaled and added as LinearInt8Block does it: a
// row's result is the same bit for bit.
//
// `Tiles` is the unit: eight registers of 16 rows of 64 bytes, with
//
//   Zero<kTile>()
//   Load<kTile>(from, stride), Store<kTile>(to, stride)
//   Multiply<kSum, kLeft, kRight>()   sum[m][n] += left[m][4 q + i] * right[q][4 n + i], over q, i
#ifndef QCOMPILE_CPU_ISA_TILE_PANEL_H_
#define QCOMPILE_CPU_ISA_TILE_PANEL_H_

#include "unpack_panel.h"

namespace qcompile::cpu {
namespace {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileBytes = 64;  // of a row
constexpr int64_t kTilePanelRows = 2 * kTileRows;
constexpr int64_t kTileQuads = kTileBytes / kQuad;
static_assert(kPanelBlocks == 2 && kColumns == kTileRows);

// Integer activations of kTilePanelRows rows: for each group [tiles][kTilePanelRows][64] codes,
// then scales [scales_per_row][kTilePanelRows]. Rows past the last one are zero.
struct TiledActivations {
  const PackedLayout& layout;
  int64_t scales_per_row;

  static int64_t TilesOf(int64_t units) { return (units * kUnit + kTileBytes - 1) / kTileBytes; }
  int64_t tiles() const {
    const int64_t last = layout.groups() - 1;
    return last * TilesOf(layout.group_units(0)) + TilesOf(layout.group_units(last));
  }
  int64_t scales_at() const { return tiles() * kTilePanelRows * kTileBytes; }
  int64_t bytes() const {
    return scales_at() + kTilePanelRows * scales_per_row * int64_t{sizeof(float)};
  }
};

void PackTiles(const LinearTile& t, uint8_t* panel) {
  const PackedLayout& layout = *t.layout;
  const TiledActivations shape = {layout, t.scales_per_row};
  const int64_t rows = t.row_end - t.row_begin;
  memset(panel, 0, shape.bytes());
  auto* scales = reinterpret_cast<float*>(panel + shape.scales_at());
  for (int64_t g = 0, k = 0; g < layout.groups(); ++g) {
    const int64_t end = k + layout.group_units(g) * kUnit;
    for (; k < end; k += Least(kTileBytes, end - k), panel += kTilePanelRows * kTileBytes) {
      for (int64_t r = 0; r < rows; ++r) {
        const int8_t* codes = t.codes + (t.row_begin + r) * layout.padded_k() + k;
        memcpy(panel + r * kTileBytes, codes, Least(kTileBytes, end - k));
      }
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t g = 0; g < t.scales_per_row; ++g) {
      scales[g * kTilePanelRows + r] = t.scales[(t.row_begin + r) * t.scales_per_row + g];
    }
  }
}

// The sums of a group, or what has been added up of them: kTilePanelRows by kPanelBlocks * 16.
constexpr int64_t kTileColumns = kPanelBlocks * kColumns;

// The whole numbers of one group. `codes` and `weights` are at the group's first k.
template <class Tiles>
void MultiplyGroup(Tiles* tiles, const uint8_t* codes, const uint8_t* weights, int64_t count,
                   int32_t* dots) {
  constexpr int64_t kWeightStride = kPanelBlocks * kQuadBytes;
  tiles->template Zero<0>();
  tiles->template Zero<1>();
  tiles->template Zero<2>();
  tiles->template Zero<3>();
  for (int64_t i = 0; i < count; ++i) {
    tiles->template Load<4>(codes, kTileBytes);
    tiles->template Load<5>(codes + kTileRows * kTileBytes, kTileBytes);
    tiles->template Load<6>(weights, kWeightStride);
    tiles->template Load<7>(weights + kQuadBytes, kWeightStride);
    tiles->template Multiply<0, 4, 6>();
    tiles->template Multiply<1, 4, 7>();
    tiles->template Multiply<2, 5, 6>();
    tiles->template Multiply<3, 5, 7>();
    codes += kTilePanelRows * kTileBytes;
    weights += kTileQuads * kWeightStride;
  }
  constexpr int64_t kStride = kTileColumns * sizeof(int32_t);
  tiles->template Store<0>(dots, kStride);
  tiles->template Store<1>(dots + kColumns, kStride);
  tiles->template Store<2>(dots + kTileRows * kTileColumns, kStride);
  tiles->template Store<3>(dots + kTileRows * kTileColumns + kColumns, kStride);
}

// Sums of a group's activations, `step` from one row to the next.
struct GroupSums {
  const int32_t* first;
  int64_t step;

  int32_t operator[](int64_t r) const { return first[r * step]; }
};

// Adds what the shifts of a group give to its whole numbers.
inline void ShiftGroup(const int32_t* shifts, GroupSums sums, int64_t rows, int32_t* dots) {
  for (int64_t r = 0; r < rows; ++r, dots += kTileColumns) {
    for (int64_t at = 0; at < kTileColumns; at += kColumns) {
      StoreInts(dots + at, LoadInts(dots + at) + LoadInts(shifts + at) * Set1(sums[r]));
    }
  }
}

// Scales the whole numbers of a group, and adds them to the totals: 5 instructions for 16 of them,
// where zero points are none that have a rest.
template <bool kHasRest>
void AddGroup(const int32_t* dots, const float* scales, const float* weight_scales,
              const float* rests, GroupSums sums, int64_t rows, float* totals) {
  F weight_scale[kPanelBlocks], rest[kPanelBlocks];
#pragma GCC unroll 2
  for (int64_t b = 0; b < kPanelBlocks; ++b) {
    weight_scale[b] = Load(weight_scales + b * kColumns);
    rest[b] = kHasRest ? Load(rests + b * kColumns) : Zero();
  }
  for (int64_t r = 0; r < rows; ++r, dots += kTileColumns, totals += kTileColumns) {
    const F row_scale = Set1(scales[r]);
#pragma GCC unroll 2
    for (int64_t b = 0; b < kPanelBlocks; ++b) {
      const int64_t at = b * kColumns;
      const F product = FloatSum(LoadInts(dots + at), kHasRest, rest[b], kHasRest ? sums[r] : 0);
      Store(totals + at, Fma(product, weight_scale[b] * row_scale, Load(totals + at)));
    }
  }
}

// `rows` rows of a panel of activations, from `row` on.
template <class Tiles>
void MultiplyTiles(Tiles* tiles, const LinearTile& t, const WeightPanel& weights, int64_t row,
                   int64_t rows, int64_t block, int64_t blocks) {
  const PackedLayout& layout = *t.layout;
  const TiledActivations shape = {layout, t.scales_per_row};
  const uint8_t* codes = t.panels + row / kTilePanelRows * shape.bytes();
  const auto* scales = reinterpret_cast<const float*>(codes + shape.scales_at());
  const int64_t scale_step = t.scales_per_row == 1 ? 0 : kTilePanelRows;
  const int64_t groups = layout.groups();
  const uint8_t* bytes = weights.bytes;
  const bool shifted = CentredBytes::HasShifts(layout);
  const auto add_group = layout.float_zero_point ? AddGroup<true> : AddGroup<false>;
  alignas(64) int32_t dots[kTilePanelRows * kTileColumns];
  alignas(64) float totals[kTilePanelRows * kTileColumns] = {};
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t units = layout.group_units(g), count = TiledActivations::TilesOf(units);
    const int64_t head = g * kTileColumns;
    const GroupSums sums = {t.sums + row * groups + g, groups};
    MultiplyGroup(tiles, codes, bytes, count, dots);
    if (shifted) ShiftGroup(weights.shifts + head, sums, rows, dots);
    add_group(dots, scales, weights.scales + head, weights.rests + head, sums, rows, totals);
    codes += count * kTilePanelRows * kTileBytes;
    bytes += units * (kUnit / kQuad) * kPanelBlocks * kQuadBytes;
    scales += scale_step;
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t b = 0; b < blocks; ++b) {
      StoreResult(t, row + r, block + b, Load(totals + r * kTileColumns + b * kColumns));
    }
  }
}

template <class Tiles>
struct TilePanelKernel {
  template <class Codes>
  static void Run(const LinearTile& t) {
    Tiles tiles;
    const WeightPanel weights = WeightPanel::In(t);
    for (int64_t block = t.block_begin; block < t.block_end; block += kPanelBlocks) {
      const int64_t blocks = Least(kPanelBlocks, t.block_end - block);
      UnpackBlocks<Codes, CentredBytes>(t, block, blocks, weights);
      for (int64_t row = t.row_begin; row < t.row_end; row += kTilePanelRows) {
        const int64_t rows = Least(kTilePanelRows, t.row_end - row);
        MultiplyTiles(&tiles, t, weights, row, rows, block, blocks);
      }
    }
  }
};

template <class Tiles>
constexpr PanelKernels kTilePanelKernels = {
    kTilePanelRows,
    kTilePanelRows,
    0,
    [](const PackedLayout& layout, int64_t scales_per_row) {
      return TiledActivations{layout, scales_per_row}.bytes();
    },
    [](const PackedLayout& layout) {
      // The last tile of weights may reach past its group, and past them all.
      return WeightPanel::Bytes(layout, kQuadBytes) + kTileQuads * kPanelBlocks * kQuadBytes;
    },
    PackTiles,
    [](const LinearTile& t) { WithByteCodes<TilePanelKernel<Tiles>>(t); },
};

}  // namespace
}  // namespace qcompile::cpu

#endif  // QCOMPILE_CPU_ISA_TILE_PANEL_H_
