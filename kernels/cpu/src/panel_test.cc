// The test that a matrix unit has to pass before it is used.
#include <cmath>
#include <cstring>

#include "panel_operands.h"

namespace qcompile::cpu {
namespace {

constexpr int64_t kRows = 45;  // part of a second panel

constexpr ScaleType kScales = ScaleType::kBfloat16;
// Groups of several tiles, of a part of one, and short ones at the end; part of a column block; k
// that are no whole number of tiles.
constexpr PackedLayout kLayouts[] = {
    {72, 360, 128, 4, true, kScales, Coding::kInteger},
    {40, 88, 88, 8, false, kScales, Coding::kInteger},
    {40, 88, 32, 8, true, kScales, Coding::kInteger},
    {40, 88, 32, 3, true, kScales, Coding::kInteger},
    {40, 88, 48, 4, true, kScales, Coding::kInteger, true},
    {16, 100, 48, 2, false, kScales, Coding::kTernary},
    {24, 88, 16, 4, false, kScales, Coding::kE2m1},
};

void MultiplyByPanels(const PanelKernels& kernels, const LinearTile& tile) {
  MultiplyPanels(kernels, tile, PackPanels(kernels, tile));
}

}  // namespace

bool PanelsMultiplyLike(const PanelKernels& panels, const KernelTable& rows) {
  for (const PackedLayout& layout : kLayouts) {
    const Operands operands(layout, kRows);
    std::vector<float> expected(static_cast<size_t>(kRows * layout.n)), actual(expected);
    rows.linear_int8(operands.Tile(expected.data()));
    MultiplyByPanels(panels, operands.Tile(actual.data()));
    if (std::memcmp(expected.data(), actual.data(), sizeof(float) * expected.size()) != 0) {
      return false;
    }
  }
  return true;
}

bool FloatPanelsMultiplyLike(const PanelKernels& panels, const KernelTable& rows) {
  // Both lose less than 2^-15 of a product, and few of their errors add up.
  constexpr float kTolerance = 1.0f / (1 << 14);
  for (const PackedLayout& layout : kLayouts) {
    const Operands operands(layout, kRows);
    std::vector<float> expected(static_cast<size_t>(kRows * layout.n)), actual(expected);
    std::vector<float> scratch(static_cast<size_t>(kLinearScratchFloats));
    LinearTile tile = operands.Tile(expected.data());
    tile.scratch = scratch.data();
    rows.linear_float(tile);
    MultiplyByPanels(panels, operands.Tile(actual.data()));
    float largest = 0.0f, error = 0.0f;
    for (size_t i = 0; i < expected.size(); ++i) {
      largest = std::max(largest, std::fabs(expected[i]));
      error = std::max(error, std::fabs(actual[i] - expected[i]));
    }
    if (!(error <= kTolerance * largest)) return false;  // a NaN is no match either
  }
  return true;
}

}  // namespace qcompile::cpu
