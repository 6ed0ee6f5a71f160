// The tile registers of AMX, as tile_panel.h takes them.
//
// In assembly, which any compiler takes: GCC's intrinsics want literal numbers of registers, and
// its version 12 believes that loading a configuration reads no more than the first bytes of it.
#ifndef QCOMPILE_CPU_ISA_AMX_TILES_H_
#define QCOMPILE_CPU_ISA_AMX_TILES_H_

#include <cstdint>

namespace qcompile::cpu {
namespace {

struct TileConfiguration {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfiguration) == 64);

// All eight in one shape: what ONNX Runtime's own kernels load, once a thread, and rely on later.
constexpr TileConfiguration kTileConfiguration = {
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

struct AmxTiles {
  // They are never released, for the same reason.
  AmxTiles() { asm volatile("ldtilecfg %0" : : "m"(kTileConfiguration)); }

  template <int kTile>
  void Zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
  }
  template <int kTile>
  void Load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(kTile) : "memory");
  }
  template <int kTile>
  void Store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(kTile) : "memory");
  }
  template <int kSum, int kLeft, int kRight>
  void Multiply() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kLeft), "i"(kRight));
  }
  template <int kSum, int kLeft, int kRight>
  void MultiplyBrain() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kLeft), "i"(kRight));
  }
};

}  // namespace
}  // namespace qcompile::cpu

#endif  // QCOMPILE_CPU_ISA_AMX_TILES_H_
