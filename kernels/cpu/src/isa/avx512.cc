#include "simd_avx512.h"
// The vector type comes first.
#include "amx_tiles.h"
#include "kernels.h"
#include "panel_dots.h"
// What follows uses it.
#include "brain_tiles.h"
#include "linear_panel.h"

namespace qcompile::cpu {

const KernelTable kAvx512Kernels = Kernels("avx512", &kPanelKernels);

const KernelTable kAmxKernels =
    Kernels("amx", &kTilePanelKernels<AmxTiles>, &kBrainTileKernels<AmxTiles>);

}  // namespace qcompile::cpu
