// The test that a matrix unit has to pass before it is used.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernel_table.h"

namespace qcompile::cpu {
namespace {

// Numbers without order, the same on every machine.
class Numbers {
 public:
  uint32_t Next() {
    state_ = state_ * 1664525u + 1013904223u;
    return state_ >> 8;
  }

 private:
  uint32_t state_ = 1;
};

constexpr int64_t kRows = 45;  // part of a second panel

// The operands of a product: bytes as they come, but with finite scales and zero points in range.
struct Operands {
  explicit Operands(const PackedLayout& packed)
      : layout(packed), weight(static_cast<size_t>(packed.total_bytes())) {
    Numbers numbers;
    for (uint8_t& byte : weight) byte = static_cast<uint8_t>(numbers.Next());
    for (int64_t block = 0; block < layout.column_blocks(); ++block) {
      for (int64_t g = 0; g < layout.groups(); ++g) {
        uint8_t* head = weight.data() + layout.block_at(block) + g * layout.group_bytes();
        for (int64_t c = 0; c < kColumns; ++c) {
          head[2 * c + 1] = kExponent;
          if (layout.has_zero_point) head[layout.scale_bytes() + c] &= (1 << layout.bits) - 1;
        }
      }
    }
    codes.resize(static_cast<size_t>(kRows * layout.padded_k()));
    for (int8_t& code : codes) code = static_cast<int8_t>(numbers.Next());
    for (int64_t r = 0; r < kRows; ++r) {
      const int8_t* code = codes.data() + r * layout.padded_k();
      for (int64_t g = 0; g < layout.groups(); ++g) {
        int32_t sum = 0;
        for (int64_t i = 0; i < layout.group_units(g) * kUnit; ++i) sum += *code++;
        sums.push_back(sum);
        scales.push_back(static_cast<float>(1 + numbers.Next() % 100) / 64.0f);
      }
    }
    x.resize(static_cast<size_t>(kRows * layout.padded_k()));
    for (float& number : x) number = static_cast<float>(numbers.Next()) / (1 << 23) - 1.0f;
  }

  LinearTile Tile(float* y) const {
    LinearTile tile = {};
    tile.layout = &layout;
    tile.weight = weight.data();
    tile.block_end = layout.column_blocks();
    tile.row_end = kRows;
    tile.codes = codes.data();
    tile.sums = sums.data();
    tile.scales = scales.data();
    tile.scales_per_row = layout.groups();
    tile.x = x.data();
    tile.x_stride = layout.padded_k();
    tile.y = y;
    return tile;
  }

  static constexpr uint8_t kExponent = 0x3c;  // the upper byte of a bfloat16 of about 1/64

  const PackedLayout layout;
  std::vector<uint8_t> weight;
  std::vector<int8_t> codes;
  std::vector<int32_t> sums;
  std::vector<float> scales;
  std::vector<float> x;  // between -1 and 1
};

constexpr ScaleType kScales = ScaleType::kBfloat16;
// Groups of several tiles, of a part of one, and short ones at the end; part of a column block; k
// that are no whole number of tiles.
constexpr PackedLayout kLayouts[] = {
    {72, 360, 128, 4, true, kScales, Coding::kInteger},
    {40, 88, 88, 8, false, kScales, Coding::kInteger},
    {40, 88, 32, 8, true, kScales, Coding::kInteger},
    {40, 88, 32, 3, true, kScales, Coding::kInteger},
    {16, 100, 48, 2, false, kScales, Coding::kTernary},
    {24, 88, 16, 4, false, kScales, Coding::kE2m1},
};

void MultiplyByPanels(const PanelKernels& kernels, LinearTile tile) {
  const int64_t panel_bytes = kernels.panel_bytes(*tile.layout, tile.scales_per_row);
  const int64_t panels = (kRows + kernels.rows - 1) / kernels.rows;
  std::vector<float> packed(static_cast<size_t>(panels * panel_bytes) / sizeof(float) + 1);
  auto* first = reinterpret_cast<uint8_t*>(packed.data());
  for (int64_t panel = 0; panel < panels; ++panel) {
    LinearTile part = tile;
    part.row_begin = panel * kernels.rows;
    part.row_end = std::min(part.row_begin + kernels.rows, kRows);
    kernels.pack(part, first + panel * panel_bytes);
  }
  const int64_t scratch_bytes = kernels.scratch_bytes(*tile.layout);
  std::vector<float> scratch(static_cast<size_t>(scratch_bytes) / sizeof(float) + 1);
  tile.panels = first;
  tile.scratch = scratch.data();
  kernels.multiply(tile);
}

}  // namespace

bool PanelsMultiplyLike(const PanelKernels& panels, const KernelTable& rows) {
  for (const PackedLayout& layout : kLayouts) {
    const Operands operands(layout);
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
    const Operands operands(layout);
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
