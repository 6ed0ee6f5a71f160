#include "simd_scalar.h"
// The vector type comes first.
#include "kernels.h"

namespace qcompile::cpu {

const KernelTable kScalarKernels = Kernels("scalar");

}  // namespace qcompile::cpu
