// How a key/value cache keeps the numbers of one head and position: `kernels/kv_append/rows.py`
// says it for every target.
//
//   bf16: the numbers, two bytes each
//   int8: one code each; int4: two codes to a byte, the first half of the numbers in low nibbles,
//   the second half in high ones. Then a float16 scale for each group, then its zero points, a byte
//   each. A number is (code - zero point) * scale.
#ifndef QCOMPILE_CPU_CACHE_ROW_H_
#define QCOMPILE_CPU_CACHE_ROW_H_

#include <cstdint>

#include "packed_layout.h"

namespace qcompile::cpu {

enum class CacheFormat : int { kFloat, kBrain, kInt8, kInt4 };

struct CacheRow {
  CacheFormat format;
  int64_t width;       // numbers
  int64_t group_size;  // numbers per scale, 1 to width
  int64_t groups;      // ceil(width / group_size): a division that no row should have to make

  // The objects of all instruction sets contain these: see QCOMPILE_ALWAYS_INLINE.
  QCOMPILE_ALWAYS_INLINE int64_t half() const { return (width + 1) / 2; }
  QCOMPILE_ALWAYS_INLINE int64_t scales_at() const {
    return format == CacheFormat::kInt4 ? half() : width;
  }
  QCOMPILE_ALWAYS_INLINE int64_t zero_points_at() const { return scales_at() + 2 * groups; }
  QCOMPILE_ALWAYS_INLINE int64_t bytes() const {
    if (format == CacheFormat::kFloat) return 4 * width;
    if (format == CacheFormat::kBrain) return 2 * width;
    return zero_points_at() + groups;
  }
};

}  // namespace qcompile::cpu

#endif  // QCOMPILE_CPU_CACHE_ROW_H_
