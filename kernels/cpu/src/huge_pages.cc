#include "huge_pages.h"

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace qcompile::cpu {
namespace {

#if defined(__linux__)

// Since Linux 6.1, which the headers of a build machine may not know.
constexpr int kCollapse = 25;
constexpr size_t kHugePage = size_t{2} << 20;

void Ask(const void* data, size_t bytes) {
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (address + page - 1) / page * page;
  const uintptr_t end = (address + bytes) / page * page;
  if (end < begin + kHugePage) return;
  auto* pages = reinterpret_cast<void*>(begin);
  // Pages of a file that were not read yet come as huge ones from now on.
  if (madvise(pages, end - begin, MADV_HUGEPAGE) != 0) return;
  // Those of the process itself are there already; the system moves them together.
  static_cast<void>(madvise(pages, end - begin, kCollapse));
}

#else

void Ask(const void*, size_t) {}

#endif

}  // namespace

void HugePages::Want(const void* data, size_t bytes) const {
  if (asked_.load(std::memory_order_relaxed) == data) return;
  if (asked_.exchange(data, std::memory_order_relaxed) != data) Ask(data, bytes);
}

}  // namespace qcompile::cpu
