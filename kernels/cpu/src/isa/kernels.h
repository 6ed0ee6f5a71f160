// The kernels that every instruction set has, over the vectors that it defines before this.
#ifndef QCOMPILE_CPU_ISA_KERNELS_H_
#define QCOMPILE_CPU_ISA_KERNELS_H_

#include "attention.h"
#include "cache_codec.h"
#include "elementwise.h"
#include "hadamard.h"
#include "kernel_table.h"
#include "linear.h"
#include "vector_linear.h"

namespace qcompile::cpu {
namespace {

// Its table; panels are what only some have.
constexpr KernelTable Kernels(const char* name, const PanelKernels* panels = nullptr,
                              const PanelKernels* float_panels = nullptr) {
  return {name,
          QuantizeActivations,
          LinearInt8,
          LinearFloat,
          panels,
          float_panels,
          LinearVectors,
          Attention,
          EncodeCacheRow,
          DecodeCacheRows,
          PackKeys,
          RmsNorm,
          GatedActivation,
          Hadamard};
}

}  // namespace
}  // namespace qcompile::cpu

#endif  // QCOMPILE_CPU_ISA_KERNELS_H_
