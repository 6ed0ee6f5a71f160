// SparseLinear: what a few floats of each row of a weight add to a linear layer.
#include <algorithm>

#include "half.h"
#include "operator.h"

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
  constexpr int64_t kMostElements = int64_t{1} << 40;  // keeps every size below within int64
  SparseRows rows = {attributes.Int("N"), attributes.Int("K"), attributes.Int("count")};
  Require(rows.n > 0 && rows.k > 0 && rows.n < kMostElements && rows.k < kMostElements &&
              rows.n <= kMostElements / rows.k,
          "N = ", rows.n, " and K = ", rows.k, " are no size of a weight");
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
    const auto weight = context.Input<uint8_t>(1);
    const auto addend = context.Input<float>(2);
    Require(x.shape.rank >= 1 && x.shape[-1] == rows_.k, "x has shape ", x.shape,
            ", and the weight has K = ", rows_.k);
    Require(weight.shape.rank == 1 && weight.shape[0] == rows_.total_bytes(),
            "the packed weight has shape ", weight.shape, " instead of [", rows_.total_bytes(),
            "]");
    Shape shape = x.shape;
    shape.dims[shape.rank - 1] = rows_.n;
    Require(addend.shape == shape, "what is added to has shape ", addend.shape, " instead of ",
            shape);
    CheckColumns(weight.data);
    const int64_t m = x.shape.Count() / rows_.k;
    float* y = context.Output(0, shape).data;
    const int64_t blocks = (rows_.n + kRowsAtATime - 1) / kRowsAtATime;
    context.ParallelFor(blocks, rows_.n * rows_.count * (m + 2), [&](int64_t block) {
      float* values = ScratchFloats(ScratchSlot::kWorker, rows_.count);
      const int64_t end = std::min(rows_.n, (block + 1) * kRowsAtATime);
      for (int64_t row = block * kRowsAtATime; row < end; ++row) {
        const int64_t start = row * rows_.count;
        for (int64_t i = 0; i < rows_.count; ++i) values[i] = rows_.Value(weight.data, start + i);
        for (int64_t token = 0; token < m; ++token) {
          const float* inputs = x.data + token * rows_.k;
          float sum = addend.data[token * rows_.n + row];
          for (int64_t i = 0; i < rows_.count; ++i) {
            sum += values[i] * inputs[rows_.Column(weight.data, start + i)];
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
