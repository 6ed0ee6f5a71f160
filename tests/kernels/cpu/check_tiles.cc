// The kernels for tile registers on a model of them in software: exits with 0 if they multiply as
// the scalar kernels do, and if registers that err are found out.
#include <cstdio>
#include <cstring>

#include "isa/simd_scalar.h"
// The vector type comes first.
#include "isa/brain_tiles.h"

namespace qcompile::cpu {
namespace {

enum class Defect { kNone, kUnsignedWeights, kHalfDepth, kKeepsSums, kTransposed };

// Eight registers of 16 rows of 64 bytes, as the manual of Intel describes TDPBSSD and TDPBF16PS.
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
    Accumulate<kSum, int32_t, kQuad>(Byte<kLeft>{*this, false},
                                     Byte<kRight>{*this, kDefect == Defect::kUnsignedWeights});
  }
  template <int kSum, int kLeft, int kRight>
  void MultiplyBrain() {
    Accumulate<kSum, float, 2>(Brain<kLeft>{*this}, Brain<kRight>{*this});
  }

 private:
  // Numbers by row and place.
  template <int kTile>
  struct Byte {
    const ModelTiles& model;
    bool no_sign;

    int32_t operator()(int64_t row, int64_t place) const {
      const uint8_t byte = model.tiles_[kTile][row][place];
      return no_sign ? byte : static_cast<int8_t>(byte);
    }
  };
  template <int kTile>
  struct Brain {
    const ModelTiles& model;

    float operator()(int64_t row, int64_t place) const {
      uint16_t upper;
      memcpy(&upper, model.tiles_[kTile][row] + 2 * place, sizeof(upper));
      const uint32_t bits = static_cast<uint32_t>(upper) << 16;
      float number;
      memcpy(&number, &bits, sizeof(bits));
      return number;
    }
  };

  // sum[m][n] += left[m][kPack * q + i] * right[q][kPack * n + i], over q and i.
  template <int kSum, class Number, int64_t kPack, class Left, class Right>
  void Accumulate(const Left& left, const Right& right) {
    const int64_t depth = kDefect == Defect::kHalfDepth ? kTileRows / 2 : kTileRows;
    for (int64_t m = 0; m < kTileRows; ++m) {
      for (int64_t n = 0; n < kColumns; ++n) {
        uint8_t* place = tiles_[kSum][m] + sizeof(Number) * n;
        Number sum;
        memcpy(&sum, place, sizeof(sum));
        for (int64_t q = 0; q < depth; ++q) {
          for (int64_t i = 0; i < kPack; ++i) {
            const bool swapped = kDefect == Defect::kTransposed;
            const int64_t row = swapped ? n : q, column = swapped ? q : n;
            sum += left(m, kPack * q + i) * right(row, kPack * column + i);
          }
        }
        memcpy(place, &sum, sizeof(sum));
      }
    }
  }

  uint8_t tiles_[8][kTileRows][kTileBytes];
};

template <Defect kDefect>
bool Passes() {
  KernelTable rows = {};
  rows.linear_int8 = LinearInt8;
  return PanelsMultiplyLike(kTilePanelKernels<ModelTiles<kDefect>>, rows);
}

template <Defect kDefect>
bool FloatsPass() {
  KernelTable rows = {};
  rows.linear_float = LinearFloat;
  return FloatPanelsMultiplyLike(kBrainTileKernels<ModelTiles<kDefect>>, rows);
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
         Report("transposed weights pass", !Passes<Defect::kTransposed>()) |
         Report("the tile kernel multiplies floats otherwise than the scalar one",
                FloatsPass<Defect::kNone>()) |
         Report("half a tile of floats passes", !FloatsPass<Defect::kHalfDepth>()) |
         Report("sums of floats that are kept pass", !FloatsPass<Defect::kKeepsSums>()) |
         Report("transposed weights pass with floats", !FloatsPass<Defect::kTransposed>());
}
