// Operands of products to try panels with, in the self test (panel_test.cc) and in tests.
#ifndef QCOMPILE_CPU_PANEL_OPERANDS_H_
#define QCOMPILE_CPU_PANEL_OPERANDS_H_

#include <algorithm>
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

// Bytes as they come, but with zero points in range and scales that are finite, where they have 16
// bits.
struct Operands {
  Operands(const PackedLayout& packed, int64_t row_count)
      : layout(packed), rows(row_count), weight(static_cast<size_t>(packed.total_bytes())) {
    Numbers numbers;
    for (uint8_t& byte : weight) byte = static_cast<uint8_t>(numbers.Next());
    for (int64_t block = 0; block < layout.column_blocks(); ++block) {
      for (int64_t g = 0; g < layout.groups(); ++g) {
        uint8_t* head = Head(block, g);
        for (int64_t c = 0; c < kColumns; ++c) {
          head[2 * c + 1] = kExponent;
          uint8_t* zeros = head + layout.scale_bytes();
          if (layout.float_zero_point) {
            zeros[2 * c] &= kFewBits;
            zeros[2 * c + 1] = kHalfExponent;
          } else if (layout.has_zero_point) {
            zeros[c] &= (1 << layout.bits) - 1;
          }
        }
      }
    }
    codes.resize(static_cast<size_t>(rows * layout.padded_k()));
    for (int8_t& code : codes) code = static_cast<int8_t>(numbers.Next());
    for (int64_t r = 0; r < rows; ++r) {
      const int8_t* code = codes.data() + r * layout.padded_k();
      for (int64_t g = 0; g < layout.groups(); ++g) {
        int32_t sum = 0;
        for (int64_t i = 0; i < layout.group_units(g) * kUnit; ++i) sum += *code++;
        sums.push_back(sum);
        scales.push_back(static_cast<float>(1 + numbers.Next() % 100) / 64.0f);
      }
    }
    x.resize(static_cast<size_t>(rows * layout.padded_k()));
    for (float& number : x) number = static_cast<float>(numbers.Next()) / (1 << 23) - 1.0f;
  }

  uint8_t* Head(int64_t block, int64_t group) {
    return weight.data() + layout.block_at(block) + group * layout.group_bytes();
  }

  // Of all outputs.
  LinearTile Tile(float* y) const {
    LinearTile tile = {};
    tile.layout = &layout;
    tile.weight = weight.data();
    tile.block_end = layout.column_blocks();
    tile.row_end = rows;
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
  // The upper byte of a float16 between 5 and 6, and what it may have in the lower one: so few bits
  // that products with whole numbers are exact.
  static constexpr uint8_t kHalfExponent = 0x45, kFewBits = 0xc0;

  const PackedLayout layout;
  const int64_t rows;
  std::vector<uint8_t> weight;
  std::vector<int8_t> codes;
  std::vector<int32_t> sums;
  std::vector<float> scales;
  std::vector<float> x;  // between -1 and 1
};

// The panels of a tile whose activations begin at row 0; floats for their alignment.
inline std::vector<float> PackPanels(const PanelKernels& kernels, const LinearTile& tile) {
  const int64_t panel_bytes = kernels.panel_bytes(*tile.layout, tile.scales_per_row);
  const int64_t panels = (tile.row_end + kernels.rows - 1) / kernels.rows;
  std::vector<float> packed(static_cast<size_t>(panels * panel_bytes) / sizeof(float) + 1);
  for (int64_t panel = 0; panel < panels; ++panel) {
    LinearTile part = tile;
    part.row_begin = panel * kernels.rows;
    part.row_end = std::min(part.row_begin + kernels.rows, tile.row_end);
    kernels.pack(part, reinterpret_cast<uint8_t*>(packed.data()) + panel * panel_bytes);
  }
  return packed;
}

// Multiplies a tile whose activations are packed.
inline void MultiplyPanels(const PanelKernels& kernels, LinearTile tile,
                           const std::vector<float>& packed) {
  const int64_t scratch_bytes = kernels.scratch_bytes(*tile.layout);
  std::vector<float> scratch(static_cast<size_t>(scratch_bytes) / sizeof(float) + 1);
  tile.panels = reinterpret_cast<const uint8_t*>(packed.data());
  tile.scratch = scratch.data();
  kernels.multiply(tile);
}

}  // namespace
}  // namespace qcompile::cpu

#endif  // QCOMPILE_CPU_PANEL_OPERANDS_H_
