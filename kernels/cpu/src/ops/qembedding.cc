// QEmbedding: rows of a packed weight, dequantized, times a constant.
#include <algorithm>
#include <cstring>

#include "codings.h"
#include "half.h"
#include "packed_weight.h"

namespace qcompile::cpu {
namespace {

float E4m3ToFloat(uint32_t code) {
  return BitsToFloat((code & 0x80u) << 24 | (code & 0x7fu) << 20) * kE4m3Exponents;
}

float FloatAt(const uint8_t* p, int64_t index) {
  float value;
  std::memcpy(&value, p + index * int64_t{sizeof(value)}, sizeof(value));
  return value;
}

float ScaleOf(const PackedLayout& layout, const uint8_t* weight, const uint8_t* header,
              int64_t row) {
  const int64_t column = row % kColumns;
  const uint8_t* outer = weight + layout.outer_scales_at(row / kColumns);
  uint16_t bits;
  switch (layout.scale_type) {
    case ScaleType::kFloat32:
      return FloatAt(header, column);
    case ScaleType::kFloat16:
      std::memcpy(&bits, header + 2 * column, sizeof(bits));
      return HalfToFloat(bits);
    case ScaleType::kBfloat16:
      std::memcpy(&bits, header + 2 * column, sizeof(bits));
      return Bfloat16ToFloat(bits);
    case ScaleType::kE8m0:
      // The exponent 0 stands for 2^-127, which a float32 spells as half of its least exponent.
      return BitsToFloat(std::max(static_cast<uint32_t>(header[column]) << 23, 1u << 22));
    case ScaleType::kE4m3:
      return E4m3ToFloat(header[column]) * FloatAt(outer, column);
    case ScaleType::kUint8:
      return static_cast<float>(header[column]) * FloatAt(outer, column);
  }
  return 0;
}

float ZeroOf(const PackedLayout& layout, const uint8_t* header, int64_t column) {
  const uint8_t* zeros = header + layout.scale_bytes();
  if (!layout.has_zero_point) return static_cast<float>(1 << (layout.bits - 1));
  if (!layout.float_zero_point) return zeros[column];
  uint16_t bits;
  std::memcpy(&bits, zeros + 2 * column, sizeof(bits));
  return HalfToFloat(bits);
}

// Adds a plane of kWidth bits to the codes, from bit `shift` of each.
template <int kWidth>
void AddPlane(const uint8_t* plane, int64_t column, int shift, uint32_t four_codes[2]) {
  constexpr int64_t kPart = 16 * kWidth;
  constexpr uint32_t kMask = 0x01010101u * ((1u << kWidth) - 1);
  for (int64_t half = 0; half < 2; ++half) {
    const int64_t byte = 64 * half + 4 * column;
    uint32_t word;
    std::memcpy(&word, plane + byte % kPart, sizeof(word));
    four_codes[half] |= (word >> byte / kPart * kWidth & kMask) << shift;
  }
}

// The codes of 8 consecutive k of one column.
void UnpackColumn(const PackedLayout& layout, const uint8_t* unit, int64_t column, uint8_t* codes) {
  // See packed_layout.h: what stands before a plane of width w are the digits of `bits` above w.
  const int bits = layout.bits;
  uint32_t four_codes[2] = {0, 0};
  if ((bits & 8) != 0) AddPlane<8>(unit, column, 0, four_codes);
  if ((bits & 4) != 0) AddPlane<4>(unit, column, 0, four_codes);
  if ((bits & 2) != 0) AddPlane<2>(unit + kColumns * (bits & 4), column, bits & 4, four_codes);
  if ((bits & 1) != 0) AddPlane<1>(unit + kColumns * (bits & 6), column, bits & 6, four_codes);
  std::memcpy(codes, four_codes, sizeof(four_codes));
}

// The ternary codes of 4 consecutive k of one column, of a group of `quads` in all.
void UnpackTrits(const uint8_t* codes, int64_t quads, int64_t quad, int64_t column, uint8_t* out) {
  const int64_t vectors = quads / kTrits, vector = quad / kTrits;
  if (vector < vectors) {
    std::memcpy(out, codes + vector * kQuadBytes + kQuad * column, kQuad);
    for (int64_t i = 0; i < kQuad; ++i) {
      uint32_t fraction = out[i];
      for (int64_t skipped = 0; skipped < quad % kTrits; ++skipped) fraction = fraction * 3 & 0xff;
      out[i] = static_cast<uint8_t>(fraction * 3 >> 8);
    }
    return;
  }
  const uint8_t* leftover =
      codes + vectors * kQuadBytes + (quad - vectors * kTrits) * kLeftoverQuadBytes;
  for (int64_t i = 0; i < kQuad; ++i) {
    const int64_t at = kQuad * column + i;
    out[i] = leftover[at % kLeftoverQuadBytes] >> at / kLeftoverQuadBytes * 2 & 3;
  }
}

// What a code stands for, but for the scale.
float ValueOf(const PackedLayout& layout, const uint8_t* weight, uint8_t code, float zero) {
  switch (layout.coding) {
    case Coding::kInteger:
      return static_cast<float>(code) - zero;
    case Coding::kTable:
      return FloatAt(weight, code);
    case Coding::kE2m1:
      return kE2m1Levels[code];
    case Coding::kE4m3:
      return E4m3ToFloat(code);
    case Coding::kTernary:
      return static_cast<float>(code - kTernaryZero);
  }
  return 0;
}

void DequantizeRow(const PackedLayout& layout, const uint8_t* weight, int64_t row, float multiplier,
                   float* out) {
  const int64_t column = row % kColumns;
  const uint8_t* p = weight + layout.block_at(row / kColumns);
  int64_t k = 0;
  for (int64_t g = 0; g < layout.groups(); ++g) {
    const float scale = ScaleOf(layout, weight, p, row);
    const float zero = ZeroOf(layout, p, column);
    p += layout.header_bytes();
    const int64_t units = layout.group_units(g), quads = units * (kUnit / kQuad);
    for (int64_t u = 0; u < units; ++u) {
      uint8_t codes[kUnit];
      if (layout.coding == Coding::kTernary) {
        UnpackTrits(p, quads, 2 * u, column, codes);
        UnpackTrits(p, quads, 2 * u + 1, column, codes + kQuad);
      } else {
        UnpackColumn(layout, p + u * layout.unit_bytes(), column, codes);
      }
      for (int64_t i = 0; i < kUnit && k < layout.k; ++i, ++k) {
        out[k] = ValueOf(layout, weight, codes[i], zero) * scale * multiplier;
      }
    }
    p += layout.code_bytes(units);
  }
}

class QEmbedding : public Operator {
 public:
  explicit QEmbedding(const Attributes& attributes)
      : layout_(ReadLayout(attributes)), multiplier_(attributes.Float("multiplier", 1.0f)) {}

  void Compute(const Context& context) const override {
    const auto ids = context.Input<int64_t>(0);
    const uint8_t* weight = CheckedWeight(context.Input<uint8_t>(1), layout_);
    Require(ids.shape.rank < kMaxRank, "ids have rank ", ids.shape.rank);
    Shape shape = ids.shape;
    shape.dims[shape.rank++] = layout_.k;
    const int64_t count = ids.shape.Count();
    for (int64_t i = 0; i < count; ++i) {
      Require(ids.data[i] >= 0 && ids.data[i] < layout_.n, "id ", ids.data[i],
              " is outside of the vocabulary of ", layout_.n);
    }
    float* out = context.Output(0, shape).data;
    context.ParallelFor(count, count * layout_.k * 4, [&](int64_t i) {
      DequantizeRow(layout_, weight, ids.data[i], multiplier_, out + i * layout_.k);
    });
  }

 private:
  const PackedLayout layout_;
  const float multiplier_;
};

}  // namespace

OperatorSpec QEmbeddingSpec() {
  return {"QEmbedding",
          {{ort::kInt64}, {ort::kUint8}},
          {{ort::kFloat}},
          [](const Attributes& attributes, const KernelTable&) -> std::unique_ptr<Operator> {
            return std::make_unique<QEmbedding>(attributes);
          }};
}

}  // namespace qcompile::cpu
