// Matrix products with float activations for many rows on a matrix unit that takes bfloat16.
//
// A bfloat16 has 8 bits of a float's 24. So a number is split in two, the nearest bfloat16 and what
// is left, which have 16 together, and three of the four products of parts are added, in float32:
// what is lost is 2^-16 of a product, not the 2^-8 of a plain bfloat16. Weights are dequantized
// with their scales, so that nothing is left to do between groups: for 32 k of 32 rows and 32
// columns, 8 tile loads and 12 products, however small the groups are.
//
// `Tiles` is the unit of tile_panel.h, with
//
//   MultiplyBrain<kSum, kLeft, kRight>()
//       sum[m][n] += left[m][2 p + i] * right[p][2 n + i], over p, i; sums are float32
#ifndef QCOMPILE_CPU_ISA_BRAIN_TILES_H_
#define QCOMPILE_CPU_ISA_BRAIN_TILES_H_

#include "tile_panel.h"

namespace qcompile::cpu {
namespace {

constexpr int64_t kStepDepth = kTileBytes / 2;          // k of a tile
constexpr int64_t kTileSize = kTileRows * kTileBytes;   // bytes
constexpr int64_t kStepBytes = 4 * kTileSize;           // two parts of two tiles
constexpr int64_t kPartBytes = 2 * kTileSize;           // of one part of a step
constexpr int64_t kBrainDepth = 1024;                   // k that are dequantized at a time
constexpr int64_t kMostBrainRows = 8 * kTilePanelRows;  // of a LinearTile
constexpr int64_t kBrainWeightBytes = kBrainDepth / kStepDepth * kStepBytes;

inline int64_t StepsOf(int64_t k) { return (k + kStepDepth - 1) / kStepDepth; }

// The parts of a number as they are stored.
inline void SplitFloat(float x, uint16_t* first, uint16_t* second) {
  constexpr uint32_t kHalf = 0x8000, kUpper = 0xffff0000;
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  bits = (bits + kHalf) & kUpper;
  *first = static_cast<uint16_t>(bits >> 16);
  float nearest;
  memcpy(&nearest, &bits, sizeof(bits));
  const float rest = x - nearest;
  memcpy(&bits, &rest, sizeof(bits));
  *second = static_cast<uint16_t>((bits + kHalf) >> 16);
}

// Rows of activations as a panel: for each step [2 parts][kTilePanelRows][32] bfloat16, with zeros
// for what there is not.
void PackBrains(const LinearTile& t, uint8_t* panel) {
  const int64_t padded_k = t.layout->padded_k();
  memset(panel, 0, StepsOf(padded_k) * kStepBytes);
  for (int64_t row = t.row_begin; row < t.row_end; ++row) {
    const float* x = t.x + row * t.x_stride;
    uint8_t* to = panel + (row - t.row_begin) * kTileBytes;
    for (int64_t k = 0; k < padded_k; k += kStepDepth, to += kStepBytes) {
      uint16_t first[kStepDepth] = {}, second[kStepDepth] = {};
      const int64_t count = Least(kStepDepth, padded_k - k);
      for (int64_t i = 0; i < count; ++i) SplitFloat(x[k + i], first + i, second + i);
      memcpy(to, first, kTileBytes);
      memcpy(to + kPartBytes, second, kTileBytes);
    }
  }
}

// Two k of 16 columns to both parts of a tile of weights.
inline void StoreBrains(uint8_t* to, F even, F odd) {
  const F near_even = RoundToBrain(even), near_odd = RoundToBrain(odd);
  StoreInts(reinterpret_cast<int32_t*>(to), PairBrains(near_even, near_odd));
  const F rest_even = RoundToBrain(even - near_even), rest_odd = RoundToBrain(odd - near_odd);
  StoreInts(reinterpret_cast<int32_t*>(to + kPartBytes), PairBrains(rest_even, rest_odd));
}

// Weights of `begin` <= k < `end`: for each step [2 parts][kPanelBlocks] tiles.
template <class Codes>
void UnpackBrains(const LinearTile& t, int64_t block, int64_t blocks, int64_t begin, int64_t end,
                  uint8_t* weights) {
  const int64_t steps = StepsOf(end - begin);
  // What is multiplied by the zeros behind the last activation must be a number.
  if ((end - begin) % kStepDepth != 0) memset(weights + (steps - 1) * kStepBytes, 0, kStepBytes);
  for (int64_t b = 0; b < kPanelBlocks; ++b) {
    int64_t pair = 0;
    ForEachValue<Codes>(t, block + Least(b, blocks - 1), begin, end,
                        [&](const F* quad) __attribute__((always_inline)) {
                          uint8_t* to = weights + pair / kTileRows * kStepBytes + b * kTileSize +
                                        pair % kTileRows * kTileBytes;
                          StoreBrains(to, quad[0], quad[1]);
                          StoreBrains(to + kTileBytes, quad[2], quad[3]);
                          pair += kQuad / 2;
                        });
  }
}

// Adds the products of a panel of activations and some weights to [kTilePanelRows][kTileColumns]
// sums, or begins them.
template <class Tiles>
void MultiplyBrains(Tiles* tiles, const uint8_t* a, const uint8_t* weights, int64_t steps,
                    bool begins, float* sums) {
  constexpr int64_t kStride = kTileColumns * sizeof(float);
  float* lower = sums + kTileRows * kTileColumns;
  if (begins) {
    tiles->template Zero<0>();
    tiles->template Zero<1>();
    tiles->template Zero<2>();
    tiles->template Zero<3>();
  } else {
    tiles->template Load<0>(sums, kStride);
    tiles->template Load<1>(sums + kColumns, kStride);
    tiles->template Load<2>(lower, kStride);
    tiles->template Load<3>(lower + kColumns, kStride);
  }
  const auto load_activations = [&](const uint8_t* part) {
    tiles->template Load<4>(part, kTileBytes);
    tiles->template Load<5>(part + kTileSize, kTileBytes);
  };
  const auto load_weights = [&](const uint8_t* part) {
    tiles->template Load<6>(part, kTileBytes);
    tiles->template Load<7>(part + kTileSize, kTileBytes);
  };
  const auto multiply = [&] {
    tiles->template MultiplyBrain<0, 4, 6>();
    tiles->template MultiplyBrain<1, 4, 7>();
    tiles->template MultiplyBrain<2, 5, 6>();
    tiles->template MultiplyBrain<3, 5, 7>();
  };
  for (int64_t i = 0; i < steps; ++i, a += kStepBytes, weights += kStepBytes) {
    load_activations(a + kPartBytes);
    load_weights(weights);
    multiply();
    load_activations(a);
    multiply();
    load_weights(weights + kPartBytes);
    multiply();
  }
  tiles->template Store<0>(sums, kStride);
  tiles->template Store<1>(sums + kColumns, kStride);
  tiles->template Store<2>(lower, kStride);
  tiles->template Store<3>(lower + kColumns, kStride);
}

template <class Tiles>
struct BrainTileKernel {
  template <class Codes>
  static void Run(const LinearTile& t) {
    Tiles tiles;
    const int64_t padded_k = t.layout->padded_k(), panel_bytes = StepsOf(padded_k) * kStepBytes;
    auto* weights = reinterpret_cast<uint8_t*>(t.scratch);
    auto* sums = reinterpret_cast<float*>(weights + kBrainWeightBytes);
    for (int64_t block = t.block_begin; block < t.block_end; block += kPanelBlocks) {
      const int64_t blocks = Least(kPanelBlocks, t.block_end - block);
      for (int64_t k = 0; k < padded_k; k += kBrainDepth) {
        const int64_t end = Least(k + kBrainDepth, padded_k);
        UnpackBrains<Codes>(t, block, blocks, k, end, weights);
        for (int64_t row = t.row_begin; row < t.row_end; row += kTilePanelRows) {
          const uint8_t* a = t.panels + row / kTilePanelRows * panel_bytes;
          MultiplyBrains(&tiles, a + k / kStepDepth * kStepBytes, weights, StepsOf(end - k), k == 0,
                         sums + (row - t.row_begin) * kTileColumns);
        }
      }
      for (int64_t row = t.row_begin; row < t.row_end; ++row) {
        const float* from = sums + (row - t.row_begin) * kTileColumns;
        for (int64_t b = 0; b < blocks; ++b) {
          StoreResult(t, row, block + b, Load(from + b * kColumns));
        }
      }
    }
  }
};

template <class Tiles>
constexpr PanelKernels kBrainTileKernels = {
    kTilePanelRows,
    kTileRows,
    kMostBrainRows,
    [](const PackedLayout& layout, int64_t) { return StepsOf(layout.padded_k()) * kStepBytes; },
    [](const PackedLayout&) {
      return kBrainWeightBytes + kMostBrainRows * kTileColumns * int64_t{sizeof(float)};
    },
    PackBrains,
    WithCodes<BrainTileKernel<Tiles>>,
};

}  // namespace
}  // namespace qcompile::cpu

#endif  // QCOMPILE_CPU_ISA_BRAIN_TILES_H_
