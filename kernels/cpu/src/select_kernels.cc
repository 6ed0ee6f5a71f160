// Which instruction set to run with.
#include <cstdlib>
#include <cstring>
#include <string>

#include "operator.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace qcompile::cpu {
namespace {

#if defined(__x86_64__)

struct CpuidLeaf {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

CpuidLeaf Cpuid(uint32_t leaf, uint32_t subleaf = 0) {
  CpuidLeaf r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

bool HasBits(uint32_t word, std::initializer_list<int> bits) {
  for (const int bit : bits) {
    if ((word >> bit & 1u) == 0) return false;
  }
  return true;
}

// The register files that the operating system saves on a context switch.
uint32_t SavedState() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

bool HasAvx2() {
  const CpuidLeaf basic = Cpuid(1), extended = Cpuid(7);
  const bool instructions =
      HasBits(basic.ecx, {12 /* fma */, 27 /* osxsave */, 28 /* avx */, 29 /* f16c */}) &&
      HasBits(extended.ebx, {5 /* avx2 */});
  return instructions && HasBits(SavedState(), {1 /* xmm */, 2 /* ymm */});
}

#if defined(QCOMPILE_AVX_VNNI)
bool HasAvxVnni() { return HasAvx2() && HasBits(Cpuid(7, 1).eax, {4 /* avx_vnni */}); }
#endif

bool HasAvx512() {
  const CpuidLeaf extended = Cpuid(7);
  return HasAvx2() && HasBits(extended.ebx, {16 /* f */, 17 /* dq */, 30 /* bw */, 31 /* vl */}) &&
         HasBits(extended.ecx, {11 /* vnni */}) &&
         HasBits(SavedState(), {5 /* opmask */, 6 /* zmm low */, 7 /* zmm high */});
}

// Linux lends the tile registers, which are 8 KB a thread, to processes that ask for them.
bool MayUseTiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool HasAmx() {
  return HasAvx512() && HasBits(Cpuid(7).edx, {22 /* bf16 */, 24 /* tile */, 25 /* int8 */}) &&
         HasBits(SavedState(), {17 /* configuration */, 18 /* tiles */}) && MayUseTiles() &&
         PanelsMultiplyLike(*kAmxKernels.panels, kAvx512Kernels) &&
         FloatPanelsMultiplyLike(*kAmxKernels.float_panels, kAvx512Kernels);
}

#endif  // __x86_64__

struct Choice {
  const KernelTable* table;
  bool supported;
};

std::vector<Choice> BestFirst() {
#if defined(__x86_64__)
  static const bool has_amx = HasAmx();
  return {{&kAmxKernels, has_amx},
          {&kAvx512Kernels, HasAvx512()},
#if defined(QCOMPILE_AVX_VNNI)
          {&kAvxVnniKernels, HasAvxVnni()},
#endif
          {&kAvx2Kernels, HasAvx2()},
          {&kScalarKernels, true}};
#else
  return {{&kScalarKernels, true}};
#endif
}

}  // namespace

const KernelTable& SelectKernels() {
  const char* wanted = std::getenv("QCOMPILE_CPU_ISA");
  const bool any = wanted == nullptr || *wanted == '\0';
  std::string names;
  for (const Choice& choice : BestFirst()) {
    if (!choice.supported) continue;
    if (any || std::strcmp(wanted, choice.table->name) == 0) return *choice.table;
    names += names.empty() ? "" : ", ";
    names += choice.table->name;
  }
  Fail("QCOMPILE_CPU_ISA is '", wanted, "', but this machine runs only: ", names);
}

}  // namespace qcompile::cpu
