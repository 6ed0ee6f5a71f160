#include "simd_avx512.h"
// The vector type comes first.
#include "attention.h"
#include "elementwise.h"
#include "hadamard.h"
#include "linear.h"

namespace qcompile::cpu {

const KernelTable kAvx512Kernels = {
    "avx512", QuantizeActivations, LinearInt8, LinearFloat, Attention,
    RmsNorm,  GatedActivation,     Hadamard,
};

}  // namespace qcompile::cpu
