// SparseLinear: what a few floats of each row of a weight add to a linear layer.
#include <algorithm>

#include "half.h"
#include "linear_inputs.h"

namespace qcompile::cpu {
namespace {

constexpr int64_t kRowsAtATime = 16;     // of the weight, by one thread
constexpr int64_t kMostShort = 1 << 15;  // columns that 16 bits tell apart

// A weight [N, K] with `count` floats in each row: the columns of all rows, 16 bits wide (32 past
// kMostShort columns), then their values in float16.
struct SparseRows {
  int64_t n, k, count;

  bool is_short() const { return k <= kMostShort; }
  int64_t values_at() const { return n * count * (is_short() ? 2 : 4); }
  int64_t total_bytes() const { return values_at() + n * count * 2; }

  int64_t Column(const uint8_t* data, int64_t place) const {
    if (is_short()) {
      uint16_t column;
      std::memcpy(&column, data + place * 2, sizeof(column));
      return column;
    }
    uint32_t column;
    std::memcpy(&column, data + place * 4, sizeof(column));
    return column;
  }

  float Value(const uint8_t* data, int64_t place) const {
    uint16_t half;
    std::memcpy(&half, data + values_at() + place * 2, sizeof(half));
    return HalfToFloat(half);
  }
};

SparseRows ReadRows(const Attributes& attributes) {
  const WeightSize size = ReadSize(attributes);
  const SparseRows rows = {size.n, size.k, attributes.Int("count")};
  Require(rows.count > 0 && rows.count <= rows.k, "count = ", rows.count, " is none of 1 to ",
          rows.k);
  return rows;
}

// y = addend + x W^T.
class SparseLinear : public Operator {
 public:
  explicit SparseLinear(const Attributes& attributes) : rows_(ReadRows(attributes)) {}

  void Compute(const Context& context) const override {
    const auto x = context.Input<float>(0);
    const Shape shape = OutputShape(x.shape, rows_.n, rows_.k);
    const uint8_t* weight = CheckedBytes(context.Input<uint8_t>(1), rows_.total_bytes());
    const auto addend = context.Input<float>(2);
    Require(addend.shape == shape, "what is added to has shape ", addend.shape, " instead of ",
            shape);
    CheckColumns(weight);
    const int64_t m = x.shape.Count() / rows_.k;
    float* y = context.Output(0, shape).data;
    const int64_t blocks = (rows_.n + kRowsAtATime - 1) / kRowsAtATime;
    context.ParallelFor(blocks, rows_.n * rows_.count * (m + 2), [&](int64_t block) {
      float* values = ScratchFloats(ScratchSlot::kWorker, rows_.count);
      const int64_t end = std::min(rows_.n, (block + 1) * kRowsAtATime);
      for (int64_t row = block * kRowsAtATime; row < end; ++row) {
        const int64_t start = row * rows_.count;
        for (int64_t i = 0; i < rows_.count; ++i) values[i] = rows_.Value(weight, start + i);
        for (int64_t token = 0; token < m; ++token) {
          const float* inputs = x.data + token * rows_.k;
          float sum = addend.data[token * rows_.n + row];
          for (int64_t i = 0; i < rows_.count; ++i) {
            sum += values[i] * inputs[rows_.Column(weight, start + i)];
          }
          y[token * rows_.n + row] = sum;
        }
      }
    });
  }

 private:
  void CheckColumns(const uint8_t* weight) const {
    int64_t most = 0;
    for (int64_t i = 0; i < rows_.n * rows_.count; ++i) {
      most = std::max(most, rows_.Column(weight, i));
    }
    Require(most < rows_.k, "the packed weight has column ", most, " of ", rows_.k);
  }

  const SparseRows rows_;
};

}  // namespace

OperatorSpec SparseLinearSpec() {
  return {"SparseLinear",
          {{ort::kFloat}, {ort::kUint8}, {ort::kFloat}},
          {{ort::kFloat}},
          [](const Attributes& attributes, const KernelTable&) -> std::unique_ptr<Operator> {
            return std::make_unique<SparseLinear>(attributes);
          }};
}

}  // namespace qcompile::cpu
