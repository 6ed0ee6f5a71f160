#include "simd_avx512.h"
// The vector type comes first.
#include "amx_tiles.h"
#include "attention.h"
#include "cache_codec.h"
#include "elementwise.h"
#include "hadamard.h"
#include "linear.h"
#include "panel_dots.h"
// What follows uses it.
#include "brain_tiles.h"
#include "linear_panel.h"
#include "vector_linear.h"

namespace qcompile::cpu {

const KernelTable kAvx512Kernels = {
    "avx512",        QuantizeActivations,
    LinearInt8,      LinearFloat,
    &kPanelKernels,  nullptr,
    LinearVectors,   Attention,
    EncodeCacheRow,  DecodeCacheRows,
    PackKeys,        RmsNorm,
    GatedActivation, Hadamard,
};

const KernelTable kAmxKernels = {
    "amx",
    QuantizeActivations,
    LinearInt8,
    LinearFloat,
    &kTilePanelKernels<AmxTiles>,
    &kBrainTileKernels<AmxTiles>,
    LinearVectors,
    Attention,
    EncodeCacheRow,
    DecodeCacheRows,
    PackKeys,
    RmsNorm,
    GatedActivation,
    Hadamard,
};

}  // namespace qcompile::cpu
