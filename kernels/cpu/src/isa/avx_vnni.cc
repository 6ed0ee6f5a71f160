#include "simd_avx2.h"
// The vector type comes first.
#include "kernels.h"
#include "panel_dots.h"
// What follows uses it.
#include "linear_panel.h"

namespace qcompile::cpu {

const KernelTable kAvxVnniKernels = Kernels("avxvnni", &kPanelKernels);

}  // namespace qcompile::cpu
