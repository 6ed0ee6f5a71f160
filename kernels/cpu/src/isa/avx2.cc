#include "simd_avx2.h"
// The vector type comes first.
#include "kernels.h"
#include "panel_words.h"
// What follows uses it.
#include "linear_panel.h"

namespace qcompile::cpu {

const KernelTable kAvx2Kernels = Kernels("avx2", &kPanelKernels);

}  // namespace qcompile::cpu
