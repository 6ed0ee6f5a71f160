// VectorLinear: a linear layer over codes of a vector codebook.
#include <algorithm>

#include "half.h"
#include "linear_inputs.h"

namespace qcompile::cpu {
namespace {

constexpr int64_t kRowsAtATime = 16;  // of the weight, by one thread

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
  VectorLinear(const Attributes& attributes, const KernelTable& kernels)
      : rows_(ReadRows(attributes)), kernels_(kernels) {}

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
      const int64_t column = block * kRowsAtATime;
      const int64_t columns = std::min(rows_.n - column, kRowsAtATime), groups = rows_.groups();
      float* scales =
          ScratchFloats(ScratchSlot::kWorker, columns * groups + kVectorScratchRows * rows_.k);
      const uint8_t* first = weight + column * rows_.row_bytes();
      for (int64_t i = 0; i < columns; ++i) {
        const uint8_t* row = first + i * rows_.row_bytes();
        for (int64_t g = 0; g < groups; ++g) scales[i * groups + g] = ScaleAt(rows_, row, g);
      }
      VectorTile tile;
      tile.k = rows_.k;
      tile.group_size = rows_.group_size;
      tile.dimension = rows_.dimension;
      tile.bits = rows_.bits;
      tile.codes = first + rows_.codes_at();
      tile.row_bytes = rows_.row_bytes();
      tile.scales = scales;
      tile.codebook = codebook.data;
      tile.columns = columns;
      tile.x = x.data;
      tile.rows = m;
      tile.bias = bias ? bias.data + column : nullptr;
      tile.y = y + column;
      tile.y_stride = rows_.n;
      tile.scratch = scales + columns * groups;
      kernels_.linear_vectors(tile);
    });
  }

 private:
  const VectorRows rows_;
  const KernelTable& kernels_;
};

}  // namespace

OperatorSpec VectorLinearSpec() {
  return {
      "VectorLinear",
      {{ort::kFloat}, {ort::kUint8}, {ort::kFloat}, {ort::kFloat, ort::kOptional}},
      {{ort::kFloat}},
      [](const Attributes& attributes, const KernelTable& kernels) -> std::unique_ptr<Operator> {
        return std::make_unique<VectorLinear>(attributes, kernels);
      }};
}

}  // namespace qcompile::cpu
