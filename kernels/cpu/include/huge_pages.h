// Weights in huge pages. A product of one row streams its weight from memory, and with pages of
// 4 KB a good part of that time is spent on finding the pages, twice as much in a virtual machine.
#ifndef QCOMPILE_CPU_HUGE_PAGES_H_
#define QCOMPILE_CPU_HUGE_PAGES_H_

#include <atomic>
#include <cstddef>

namespace qcompile::cpu {

// The pages of one weight, which stands at the same place from call to call.
class HugePages {
 public:
  // Asks the system for huge pages where `data` stands, once. It is free to refuse.
  void Want(const void* data, size_t bytes) const;

 private:
  mutable std::atomic<const void*> asked_{nullptr};
};

}  // namespace qcompile::cpu

#endif  // QCOMPILE_CPU_HUGE_PAGES_H_
