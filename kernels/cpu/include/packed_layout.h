// The storage format of a packed linear weight. `kernels/cpu/layout.py` writes it.
//
//   [ceil(N / 16) column blocks][G groups] {
//     16 scales in the scale type
//     16 zero points, uint8, if the weight has them
//     codes: for every 8 k, 16 * bits bytes
//   }
//
// The codes of 8 k are a picture of 128 bytes, one per code, of which 64 * (k / 4) + 4 * column +
// k % 4 is that of (column, k). It is stored in planes: their widths are the powers of two that add
// up to `bits`, widest first, and the first has the lowest bits of the codes. A plane of `width`
// bits is 16 * width bytes long, and so are the 8 / width parts that it cuts the picture in: part t
// has bits [t * width, (t + 1) * width) of every byte. 4 bits are thus 64 bytes whose low nibbles
// are k = 0..3 and whose high nibbles are k = 4..7; 6 bits are these and 32 bytes with the codes'
// upper two bits.
//
// The last group is padded along K to a multiple of 8 with its zero point, N to a multiple of 16
// with scale 0. One 64-byte half of the picture holds 4 consecutive k of 16 columns: what a dot
// product of bytes wants, with no sums across lanes, and scales in the same stream as their codes.
#ifndef QCOMPILE_CPU_PACKED_LAYOUT_H_
#define QCOMPILE_CPU_PACKED_LAYOUT_H_

#include <cstdint>

namespace qcompile::cpu {

constexpr int kLayoutVersion = 1;
constexpr int64_t kColumns = 16;  // columns per block: lanes of the widest vector
constexpr int64_t kUnit = 8;      // k per unit of codes

enum class ScaleType : int { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

struct PackedLayout {
  int64_t n;
  int64_t k;
  int64_t group_size;  // as stored: K when the weight has one group per channel
  int bits;
  bool has_zero_point;
  ScaleType scale_type;

  int64_t groups() const { return (k + group_size - 1) / group_size; }
  int64_t column_blocks() const { return (n + kColumns - 1) / kColumns; }
  int64_t padded_k() const { return (k + kUnit - 1) / kUnit * kUnit; }
  int64_t scale_bytes() const {
    return kColumns * (scale_type == ScaleType::kFloat32 ? sizeof(float) : sizeof(uint16_t));
  }
  int64_t header_bytes() const { return scale_bytes() + (has_zero_point ? kColumns : 0); }
  int64_t unit_bytes() const { return kColumns * bits; }
  // Units of 8 k in group `g`.
  int64_t group_units(int64_t g) const {
    const int64_t begin = g * group_size;
    const int64_t end = begin + group_size < k ? begin + group_size : padded_k();
    return (end - begin) / kUnit;
  }
  // Distance between the heads of two neighbouring groups.
  int64_t group_bytes() const { return header_bytes() + group_size / kUnit * unit_bytes(); }
  int64_t column_block_bytes() const {
    return groups() * header_bytes() + padded_k() / kUnit * unit_bytes();
  }
  int64_t total_bytes() const { return column_blocks() * column_block_bytes(); }
};

}  // namespace qcompile::cpu

#endif  // QCOMPILE_CPU_PACKED_LAYOUT_H_
