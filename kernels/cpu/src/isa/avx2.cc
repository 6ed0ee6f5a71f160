#include "simd_avx2.h"
// The vector type comes first.
#include "attention.h"
#include "cache_codec.h"
#include "elementwise.h"
#include "hadamard.h"
#include "linear.h"
#include "panel_words.h"
// What follows uses it.
#include "linear_panel.h"
#include "vector_linear.h"

namespace qcompile::cpu {

const KernelTable kAvx2Kernels = {
    "avx2",          QuantizeActivations,
    LinearInt8,      LinearFloat,
    &kPanelKernels,  nullptr,
    LinearVectors,   Attention,
    EncodeCacheRow,  DecodeCacheRows,
    PackKeys,        RmsNorm,
    GatedActivation, Hadamard,
};

}  // namespace qcompile::cpu
