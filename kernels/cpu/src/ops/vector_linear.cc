// VectorLinear: a linear layer over codes of a vector codebook.
#include <algorithm>

#include "half.h"
#include "linear_inputs.h"

namespace qcompile::cpu {
namespace {

constexpr int64_t kRowsAtATime = 8;  // of the weight, by one thread
constexpr int64_t kLanes = 16;       // partial sums: the order of additions is always the same

// A weight [N, K], row by row: the scales of a row's groups, then its codes of `bits` bits, lowest
// bits first. One byte more stands at the end, so that any code may be read with its next byte.
struct VectorRows {
  int64_t n, k, group_size, dimension;
  int bits;
  ScaleType scale_type;

  int64_t groups() const { return (k + group_size - 1) / group_size; }
  int64_t scale_bytes() const { return scale_type == ScaleType::kFloat32 ? 4 : 2; }
  int64_t codes_at() const { return groups() * scale_bytes(); }
  int64_t row_bytes() const { return codes_at() + (k / dimension * bits + 7) / 8; }
  int64_t total_bytes() const { return n * row_bytes() + 1; }
};

float ScaleAt(const VectorRows& rows, const uint8_t* row, int64_t group) {
  const uint8_t* p = row + group * rows.scale_bytes();
  if (rows.scale_type == ScaleType::kFloat32) {
    float value;
    std::memcpy(&value, p, sizeof(value));
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, p, sizeof(bits));
  return rows.scale_type == ScaleType::kFloat16 ? HalfToFloat(bits) : Bfloat16ToFloat(bits);
}

// One row of the weight as floats. kDimension is that of the codebook, or 0 for any.
template <int kDimension>
void DecodeRow(const VectorRows& rows, const uint8_t* row, const float* codebook, float* out) {
  const int64_t dimension = kDimension == 0 ? rows.dimension : kDimension;
  const uint8_t* codes = row + rows.codes_at();
  const uint32_t mask = (1u << rows.bits) - 1;
  int64_t bit = 0;
  for (int64_t g = 0; g < rows.groups(); ++g) {
    const float scale = ScaleAt(rows, row, g);
    const int64_t end = std::min(rows.k, (g + 1) * rows.group_size);
    for (int64_t k = g * rows.group_size; k < end; k += dimension, bit += rows.bits) {
      const uint32_t word = codes[bit / 8] | static_cast<uint32_t>(codes[bit / 8 + 1]) << 8;
      const float* vector = codebook + (word >> bit % 8 & mask) * dimension;
      for (int64_t i = 0; i < dimension; ++i) out[k + i] = vector[i] * scale;
    }
  }
}

float Dot(const float* a, const float* b, int64_t count) {
  float sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += a[i + lane] * b[i + lane];
  }
  for (; i < count; ++i) sums[i % kLanes] += a[i] * b[i];
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  }
  return sums[0];
}

VectorRows ReadRows(const Attributes& attributes) {
  const WeightSize size = ReadSize(attributes);
  VectorRows rows;
  rows.n = size.n;
  rows.k = size.k;
  const int64_t bits = attributes.Int("bits");
  Require(bits >= 1 && bits <= 8, "bits = ", bits, " is not supported; use 1 to 8");
  rows.bits = static_cast<int>(bits);
  rows.dimension = attributes.Int("dimension");
  Require(rows.dimension > 0 && rows.k % rows.dimension == 0, "K = ", rows.k,
          " does not hold whole vectors of ", rows.dimension);
  const int64_t group_size = attributes.Int("group_size");
  Require(group_size >= 0 && group_size % rows.dimension == 0, "group_size = ", group_size,
          " does not hold whole vectors of ", rows.dimension);
  rows.group_size = group_size == 0 || group_size > rows.k ? rows.k : group_size;
  const int64_t scale_type = attributes.Int("scale_dtype");
  Require(scale_type >= 0 && scale_type <= 2, "scale_dtype = ", scale_type,
          " is none of 0 (float32), 1 (float16), 2 (bfloat16)");
  rows.scale_type = static_cast<ScaleType>(scale_type);
  return rows;
}

// y = x W^T + bias.
class VectorLinear : public Operator {
 public:
  explicit VectorLinear(const Attributes& attributes) : rows_(ReadRows(attributes)) {}

  void Compute(const Context& context) const override {
    const auto x = context.Input<float>(0);
    const Shape shape = OutputShape(x.shape, rows_.n, rows_.k);
    const uint8_t* weight = CheckedBytes(context.Input<uint8_t>(1), rows_.total_bytes());
    const auto codebook = context.Input<float>(2);
    const auto bias = context.Input<float>(3);
    Require(codebook.shape.rank == 2 && codebook.shape[0] == int64_t{1} << rows_.bits &&
                codebook.shape[1] == rows_.dimension,
            "the codebook has shape ", codebook.shape, " instead of [", int64_t{1} << rows_.bits,
            ", ", rows_.dimension, "]");
    RequireVector("bias", bias, rows_.n);
    const int64_t m = x.shape.Count() / rows_.k;
    float* y = context.Output(0, shape).data;
    const int64_t blocks = (rows_.n + kRowsAtATime - 1) / kRowsAtATime;
    context.ParallelFor(blocks, rows_.n * rows_.k * (m + 2), [&](int64_t block) {
      float* row = ScratchFloats(ScratchSlot::kWorker, rows_.k);
      const int64_t end = std::min(rows_.n, (block + 1) * kRowsAtATime);
      for (int64_t column = block * kRowsAtATime; column < end; ++column) {
        Decode(weight + column * rows_.row_bytes(), codebook.data, row);
        const float start = bias ? bias.data[column] : 0.0f;
        for (int64_t i = 0; i < m; ++i) {
          y[i * rows_.n + column] = Dot(x.data + i * rows_.k, row, rows_.k) + start;
        }
      }
    });
  }

 private:
  void Decode(const uint8_t* row, const float* codebook, float* out) const {
    switch (rows_.dimension) {
      case 2:
        return DecodeRow<2>(rows_, row, codebook, out);
      case 4:
        return DecodeRow<4>(rows_, row, codebook, out);
      default:
        return DecodeRow<0>(rows_, row, codebook, out);
    }
  }

  const VectorRows rows_;
};

}  // namespace

OperatorSpec VectorLinearSpec() {
  return {"VectorLinear",
          {{ort::kFloat}, {ort::kUint8}, {ort::kFloat}, {ort::kFloat, ort::kOptional}},
          {{ort::kFloat}},
          [](const Attributes& attributes, const KernelTable&) -> std::unique_ptr<Operator> {
            return std::make_unique<VectorLinear>(attributes);
          }};
}

}  // namespace qcompile::cpu
