// What QLinear and QEmbedding share: the attributes of a packed weight and its tensor.
#ifndef QCOMPILE_CPU_OPS_PACKED_WEIGHT_H_
#define QCOMPILE_CPU_OPS_PACKED_WEIGHT_H_

#include "linear_inputs.h"

namespace qcompile::cpu {

inline Coding ReadCoding(const Attributes& attributes, const std::string& prefix = "") {
  const std::string coding = attributes.String((prefix + "coding").c_str(), "integer");
  if (coding == "integer") return Coding::kInteger;
  if (coding == "table") return Coding::kTable;
  if (coding == "e2m1") return Coding::kE2m1;
  if (coding == "e4m3") return Coding::kE4m3;
  if (coding == "ternary") return Coding::kTernary;
  Fail("coding = '", coding, "' is none of 'integer', 'table', 'e2m1', 'e4m3', 'ternary'");
}

// Bits of the codes of a coding, or 0 where any number will do.
inline int FixedBits(Coding coding) {
  switch (coding) {
    case Coding::kE2m1:
      return 4;
    case Coding::kE4m3:
      return 8;
    case Coding::kTernary:
      return 2;
    default:
      return 0;
  }
}

// `size` names the attribute that says how many columns there are; all names may have a prefix.
inline PackedLayout ReadLayout(const Attributes& attributes, const char* size = "N",
                               const std::string& prefix = "") {
  const auto read = [&](const char* name) { return attributes.Int((prefix + name).c_str()); };
  const WeightSize shape = ReadSize(attributes, size, prefix);
  PackedLayout layout;
  layout.n = shape.n;
  layout.k = shape.k;
  const int64_t bits = read("bits");
  Require(bits >= 1 && bits <= 8, "bits = ", bits, " is not supported; use 1 to 8");
  layout.bits = static_cast<int>(bits);
  const int64_t group_size = read("group_size");
  Require(group_size >= 0 && group_size % 16 == 0, "group_size = ", group_size,
          " is neither 0 (per channel) nor a multiple of 16");
  layout.group_size = group_size == 0 || group_size > layout.k ? layout.k : group_size;
  const int64_t has_zero_point = attributes.Int((prefix + "has_zero_point").c_str(), 0);
  Require(has_zero_point == 0 || has_zero_point == 1, "has_zero_point = ", has_zero_point,
          " is neither 0 nor 1");
  layout.has_zero_point = has_zero_point == 1;
  const int64_t float_zero_point = attributes.Int((prefix + "float_zero_point").c_str(), 0);
  Require(float_zero_point == 0 || (float_zero_point == 1 && layout.has_zero_point),
          "float_zero_point = ", float_zero_point, " is neither 0 nor, of zero points, 1");
  layout.float_zero_point = float_zero_point == 1;
  const int64_t scale_type = read("scale_dtype");
  Require(scale_type >= 0 && scale_type <= 5, "scale_dtype = ", scale_type,
          " is none of 0 (float32), 1 (float16), 2 (bfloat16), 3 (e8m0), 4 (e4m3), 5 (uint8)");
  layout.scale_type = static_cast<ScaleType>(scale_type);
  layout.coding = ReadCoding(attributes, prefix);
  Require(layout.coding == Coding::kInteger || !layout.has_zero_point,
          "only integers have zero points");
  const int fixed_bits = FixedBits(layout.coding);
  Require(fixed_bits == 0 || fixed_bits == layout.bits, "bits = ", layout.bits,
          ", but the coding has ", fixed_bits);
  return layout;
}

inline const uint8_t* CheckedWeight(const Tensor<const uint8_t>& weight,
                                    const PackedLayout& layout) {
  return CheckedBytes(weight, layout.total_bytes(), ", the bytes of N = ", layout.n,
                      ", K = ", layout.k, " at ", layout.bits, " bits in groups of ",
                      layout.group_size);
}

}  // namespace qcompile::cpu

#endif  // QCOMPILE_CPU_OPS_PACKED_WEIGHT_H_
