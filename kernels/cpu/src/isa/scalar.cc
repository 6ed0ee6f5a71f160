#include "simd_scalar.h"
// The vector type comes first.
#include "attention.h"
#include "cache_codec.h"
#include "elementwise.h"
#include "hadamard.h"
#include "linear.h"
#include "vector_linear.h"

namespace qcompile::cpu {

const KernelTable kScalarKernels = {
    "scalar",        QuantizeActivations,
    LinearInt8,      LinearFloat,
    nullptr,         nullptr,
    LinearVectors,   Attention,
    EncodeCacheRow,  DecodeCacheRows,
    PackKeys,        RmsNorm,
    GatedActivation, Hadamard,
};

}  // namespace qcompile::cpu
