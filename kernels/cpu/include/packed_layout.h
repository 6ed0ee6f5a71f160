// The storage format of a packed linear weight. `kernels/cpu/layout.py` writes it.
//
//   levels: 2^max(bits, 4) float32, if the coding is a table
//   outer scales, float32: 16 times the weight's, or one per column of a block
//   [ceil(N / 16) column blocks][G groups] {
//     16 scales in the scale type
//     16 zero points, uint8 or float16, if the weight has them
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
// Ternary codes stand five to a byte instead. Five consecutive halves of pictures ("quads", 4 k
// each) become 64 bytes; a byte is the fraction ceil(256 * v / 243), where v has the five codes for
// its ternary digits, the first k highest. The up to four quads that are left in a group follow as
// planes of 2 bits, 16 bytes each.
//
// The last group is padded along K to a multiple of 8 with the code of 0 (or with code 0), N to a
// multiple of 16 with scale 0. One 64-byte half of the picture holds 4 consecutive k of 16 columns:
// what a dot product of bytes wants, with no sums across lanes, and scales in the same stream as
// their codes.
#ifndef QCOMPILE_CPU_PACKED_LAYOUT_H_
#define QCOMPILE_CPU_PACKED_LAYOUT_H_

#include <cstdint>

// Files of several instruction sets include this one. A function that was not inlined would be in
// all of their objects, and the linker would keep any: perhaps one that the machine cannot run.
#define QCOMPILE_ALWAYS_INLINE [[gnu::always_inline]] inline

namespace qcompile::cpu {

constexpr int kLayoutVersion = 2;
constexpr int64_t kColumns = 16;    // columns per block: lanes of the widest vector
constexpr int64_t kUnit = 8;        // k per unit of codes
constexpr int64_t kQuad = 4;        // k per quad
constexpr int64_t kQuadBytes = 64;  // of a quad's codes, one byte each
constexpr int64_t kTrits = 5;       // ternary codes per byte
constexpr int64_t kLeftoverQuadBytes = 16;

enum class ScaleType : int {
  kFloat32 = 0,
  kFloat16 = 1,
  kBfloat16 = 2,
  kE8m0 = 3,   // a power of two: the exponent of a float32
  kE4m3 = 4,   // an 8-bit float, times an outer scale of the weight
  kUint8 = 5,  // a whole number, times an outer scale of the column
};

// What a code stands for, before scales.
enum class Coding : int {
  kInteger,  // code - zero point
  kTable,    // levels[code]
  kE2m1,     // a float of 4 bits
  kE4m3,     // a float of 8 bits
  kTernary,  // code - 1
};

struct PackedLayout {
  int64_t n;
  int64_t k;
  int64_t group_size;  // as stored: K when the weight has one group per channel
  int bits;
  bool has_zero_point;
  ScaleType scale_type;
  Coding coding;
  bool float_zero_point = false;  // float16 in place of uint8

  QCOMPILE_ALWAYS_INLINE int64_t groups() const { return (k + group_size - 1) / group_size; }
  QCOMPILE_ALWAYS_INLINE int64_t column_blocks() const { return (n + kColumns - 1) / kColumns; }
  QCOMPILE_ALWAYS_INLINE int64_t padded_k() const { return (k + kUnit - 1) / kUnit * kUnit; }

  QCOMPILE_ALWAYS_INLINE int64_t level_bytes() const {
    if (coding != Coding::kTable) return 0;
    return static_cast<int64_t>(sizeof(float)) << (bits < 4 ? 4 : bits);
  }
  QCOMPILE_ALWAYS_INLINE int64_t outer_scale_bytes() const {
    constexpr int64_t kBlockBytes = kColumns * sizeof(float);
    if (scale_type == ScaleType::kE4m3) return kBlockBytes;
    return scale_type == ScaleType::kUint8 ? column_blocks() * kBlockBytes : 0;
  }
  // Where the outer scales of a column block stand, if there are any.
  QCOMPILE_ALWAYS_INLINE int64_t outer_scales_at(int64_t block) const {
    const bool per_column = scale_type == ScaleType::kUint8;
    return level_bytes() + (per_column ? block * kColumns * int64_t{sizeof(float)} : 0);
  }
  QCOMPILE_ALWAYS_INLINE int64_t block_at(int64_t block) const {
    return level_bytes() + outer_scale_bytes() + block * column_block_bytes();
  }

  QCOMPILE_ALWAYS_INLINE int64_t scale_bytes() const {
    switch (scale_type) {
      case ScaleType::kFloat32:
        return kColumns * sizeof(float);
      case ScaleType::kFloat16:
      case ScaleType::kBfloat16:
        return kColumns * sizeof(uint16_t);
      default:
        return kColumns;
    }
  }
  QCOMPILE_ALWAYS_INLINE int64_t zero_point_bytes() const {
    if (!has_zero_point) return 0;
    return float_zero_point ? kColumns * int64_t{sizeof(uint16_t)} : kColumns;
  }
  QCOMPILE_ALWAYS_INLINE int64_t header_bytes() const { return scale_bytes() + zero_point_bytes(); }
  QCOMPILE_ALWAYS_INLINE int64_t unit_bytes() const { return kColumns * bits; }
  // Units of 8 k in group `g`.
  QCOMPILE_ALWAYS_INLINE int64_t group_units(int64_t g) const {
    const int64_t begin = g * group_size;
    const int64_t end = begin + group_size < k ? begin + group_size : padded_k();
    return (end - begin) / kUnit;
  }
  // Bytes of the codes of a group.
  QCOMPILE_ALWAYS_INLINE int64_t code_bytes(int64_t units) const {
    if (coding != Coding::kTernary) return units * unit_bytes();
    const int64_t quads = units * (kUnit / kQuad);
    return quads / kTrits * kQuadBytes + quads % kTrits * kLeftoverQuadBytes;
  }
  // Distance between the heads of two neighbouring groups.
  QCOMPILE_ALWAYS_INLINE int64_t group_bytes() const {
    return header_bytes() + code_bytes(group_size / kUnit);
  }
  QCOMPILE_ALWAYS_INLINE int64_t column_block_bytes() const {
    const int64_t last = groups() - 1;
    return last * group_bytes() + header_bytes() + code_bytes(group_units(last));
  }
  QCOMPILE_ALWAYS_INLINE int64_t total_bytes() const { return block_at(column_blocks()); }
};

}  // namespace qcompile::cpu

#endif  // QCOMPILE_CPU_PACKED_LAYOUT_H_
