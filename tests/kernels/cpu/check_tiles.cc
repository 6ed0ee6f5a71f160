// The kernel for tile registers on a model of them in software: exits with 0 if it multiplies as
// the scalar kernel does, and if registers that err are found out.
#include <cstdio>
#include <cstring>

#include "isa/simd_scalar.h"
// The vector type comes first.
#include "isa/tile_panel.h"

namespace qcompile::cpu {
namespace {

enum class Defect { kNone, kUnsignedWeights, kHalfDepth, kKeepsSums, kTransposed };

// Eight registers of 16 rows of 64 bytes, as the manual of Intel describes TDPBSSD.
template <Defect kDefect>
class ModelTiles {
 public:
  template <int kTile>
  void Zero() {
    if (kDefect != Defect::kKeepsSums) memset(tiles_[kTile], 0, sizeof(tiles_[kTile]));
  }
  template <int kTile>
  void Load(const void* from, int64_t stride) {
    for (int64_t row = 0; row < kTileRows; ++row) {
      memcpy(tiles_[kTile][row], static_cast<const uint8_t*>(from) + row * stride, kTileBytes);
    }
  }
  template <int kTile>
  void Store(void* to, int64_t stride) {
    for (int64_t row = 0; row < kTileRows; ++row) {
      memcpy(static_cast<uint8_t*>(to) + row * stride, tiles_[kTile][row], kTileBytes);
    }
  }
  template <int kSum, int kLeft, int kRight>
  void Multiply() {
    const int64_t quads = kDefect == Defect::kHalfDepth ? kTileQuads / 2 : kTileQuads;
    for (int64_t m = 0; m < kTileRows; ++m) {
      for (int64_t n = 0; n < kColumns; ++n) {
        uint8_t* place = tiles_[kSum][m] + 4 * n;
        int32_t sum;
        memcpy(&sum, place, sizeof(sum));
        for (int64_t q = 0; q < quads; ++q) {
          for (int64_t i = 0; i < kQuad; ++i) sum += Left<kLeft>(m, q, i) * Right<kRight>(n, q, i);
        }
        memcpy(place, &sum, sizeof(sum));
      }
    }
  }

 private:
  template <int kTile>
  int32_t Left(int64_t m, int64_t q, int64_t i) const {
    return static_cast<int8_t>(tiles_[kTile][m][kQuad * q + i]);
  }
  template <int kTile>
  int32_t Right(int64_t n, int64_t q, int64_t i) const {
    const uint8_t byte = kDefect == Defect::kTransposed ? tiles_[kTile][n][kQuad * q + i]
                                                        : tiles_[kTile][q][kQuad * n + i];
    return kDefect == Defect::kUnsignedWeights ? byte : static_cast<int8_t>(byte);
  }

  uint8_t tiles_[8][kTileRows][kTileBytes];
};

template <Defect kDefect>
bool Passes() {
  KernelTable rows = {};
  rows.linear_int8 = LinearInt8;
  KernelTable panels = {};
  panels.panels = &kTilePanelKernels<ModelTiles<kDefect>>;
  return PanelsMultiplyLike(panels, rows);
}

int Report(const char* what, bool as_expected) {
  if (!as_expected) std::fprintf(stderr, "%s\n", what);
  return as_expected ? 0 : 1;
}

}  // namespace
}  // namespace qcompile::cpu

int main() {
  using namespace qcompile::cpu;
  return Report("the tile kernel multiplies otherwise than the scalar one",
                Passes<Defect::kNone>()) |
         Report("unsigned weights pass", !Passes<Defect::kUnsignedWeights>()) |
         Report("half a tile passes", !Passes<Defect::kHalfDepth>()) |
         Report("sums that are kept pass", !Passes<Defect::kKeepsSums>()) |
         Report("transposed weights pass", !Passes<Defect::kTransposed>());
}
