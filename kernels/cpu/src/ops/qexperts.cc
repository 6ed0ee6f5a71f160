// QExperts: routed experts over packed weights.
//
//   y[t] = sum over c of weight[t, c] * (down_e . h(up_e . x[t] + up_bias_e) + down_bias_e),
//   e = index[t, c]
//
// The rows of an expert are gathered, and go through its two products together. With int8
// activations both products round what they read. Experts that no row is routed to are not read;
// numbers that name no expert add nothing.
#include <algorithm>
#include <cstring>

#include "activation.h"
#include "linear_product.h"

namespace qcompile::cpu {
namespace {

constexpr size_t kX = 0, kIndex = 1, kWeight = 2, kUp = 3, kUpBias = 4, kDown = 5, kDownBias = 6;

// Rows that go through an expert together: they bound the memory that its hidden values take.
constexpr int64_t kMostRows = 256;

// What stands between the products. Every kind is an activation of the library of `slope` times
// its argument, times the other half over `slope`, and perhaps times the argument itself.
class Gate {
 public:
  explicit Gate(const Attributes& attributes)
      : gated_(attributes.Int("gated") != 0),
        limit_(attributes.Float("limit", 0.0f)),
        offset_(attributes.Float("offset", 0.0f)) {
    const std::string kind = attributes.String("kind", "silu");
    squared_ = kind == "relu2";
    if (kind == "quick_gelu") {
      slope_ = 1.702f;
      activation_ = Activation::kSilu;
    } else {
      activation_ = squared_ ? Activation::kRelu : ReadActivation(attributes);
    }
    Require(limit_ >= 0.0f, "limit is negative");
  }

  int64_t Inner(int64_t width) const { return gated_ ? width / 2 : width; }

  // From `hidden` [width], which is overwritten, to `inner` [Inner(width)].
  void Apply(const KernelTable& kernels, float* hidden, float* inner, int64_t width) const {
    const int64_t count = Inner(width);
    float* other = gated_ ? hidden + count : inner;
    for (int64_t i = 0; i < count; ++i) {
      float gate = hidden[i], factor = 1.0f;
      if (gated_) {
        factor = other[i];
        if (limit_ > 0.0f) {
          gate = std::min(gate, limit_);
          factor = std::min(std::max(factor, -limit_), limit_);
        }
        factor += offset_;
      }
      other[i] = (squared_ ? gate * factor : factor) / slope_;
      hidden[i] = gate * slope_;
    }
    kernels.gated_activation(activation_, hidden, other, inner, count);
  }

 private:
  const bool gated_;
  const float limit_;
  const float offset_;
  bool squared_;
  float slope_ = 1.0f;
  Activation activation_;
};

// A choice of an expert: which row, and with which weight.
struct Choice {
  int64_t row;
  float weight;
};

// The choices of all experts, one expert after the other, in the order of the rows.
class Routes {
 public:
  Routes(const Tensor<const int64_t>& index, const float* weight, int64_t experts)
      : ends_(static_cast<size_t>(experts), 0) {
    const int64_t choices = index.shape[1], total = index.shape.Count();
    const auto known = [&](int64_t i) { return index.data[i] >= 0 && index.data[i] < experts; };
    for (int64_t i = 0; i < total; ++i) {
      if (known(i)) ++ends_[static_cast<size_t>(index.data[i])];
    }
    int64_t before = 0;
    for (int64_t& end : ends_) {
      before += end;
      end = before - end;  // for now, where an expert begins
    }
    choices_.resize(static_cast<size_t>(before));
    for (int64_t i = 0; i < total; ++i) {
      if (!known(i)) continue;
      int64_t& next = ends_[static_cast<size_t>(index.data[i])];
      choices_[static_cast<size_t>(next++)] = {i / choices, weight[i]};
    }
  }

  // Calls function(expert, choices, count) for up to kMostRows choices of one expert at a time.
  template <class Function>
  void ForEach(Function function) const {
    int64_t begin = 0;
    for (size_t expert = 0; expert < ends_.size(); ++expert) {
      for (; begin < ends_[expert]; begin += kMostRows) {
        const int64_t count = std::min(ends_[expert] - begin, kMostRows);
        function(static_cast<int64_t>(expert), choices_.data() + begin, count);
      }
      begin = ends_[expert];
    }
  }

  int64_t most_rows() const { return std::min(static_cast<int64_t>(choices_.size()), kMostRows); }

 private:
  std::vector<int64_t> ends_;
  std::vector<Choice> choices_;
};

class QExperts : public Operator {
 public:
  QExperts(const Attributes& attributes, const KernelTable& kernels)
      : count_(attributes.Int("count")),
        up_(ReadLayout(attributes, "N", "up_")),
        down_(ReadLayout(attributes, "N", "down_")),
        gate_(attributes),
        act_(ReadActivationFormat(attributes)),
        kernels_(kernels) {
    constexpr int64_t kMostExperts = int64_t{1} << 20;
    Require(count_ > 0 && count_ < kMostExperts, "count = ", count_, " is no number of experts");
    Require(down_.n == up_.k && down_.k == gate_.Inner(up_.n), "matrices of ", up_.n, " x ", up_.k,
            " and ", down_.n, " x ", down_.k, " do not follow one another");
    Require(!act_.is_static(), "experts have no static activations");
    RequireProduct(up_, act_);
    RequireProduct(down_, act_);
  }

  void Compute(const Context& context) const override {
    const auto x = context.Input<float>(kX);
    Require(x.shape.rank == 2 && x.shape[1] == up_.k, "x has shape ", x.shape,
            " instead of [rows, ", up_.k, "]");
    const auto index = context.Input<int64_t>(kIndex);
    const auto weight = context.Input<float>(kWeight);
    Require(index.shape.rank == 2 && index.shape[0] == x.shape[0], "index has shape ", index.shape,
            ", but there are ", x.shape[0], " rows");
    Require(weight.shape == index.shape, "weight has shape ", weight.shape, ", but index has ",
            index.shape);
    const Expert up = ReadExpert(context, kUp, kUpBias, up_);
    const Expert down = ReadExpert(context, kDown, kDownBias, down_);
    float* y = context.Output(0, x.shape).data;
    std::fill(y, y + x.shape.Count(), 0.0f);

    const Routes routes(index, weight.data, count_);
    const int64_t most = routes.most_rows();
    float* rows = ScratchFloats(ScratchSlot::kExperts, most * (up_.k + up_.n + down_.k + down_.n));
    float* hidden = rows + most * up_.k;
    float* inner = hidden + most * up_.n;
    float* made = inner + most * down_.k;
    const LinearProduct product(context, kernels_, act_);
    routes.ForEach([&](int64_t expert, const Choice* choices, int64_t count) {
      for (int64_t i = 0; i < count; ++i) {
        const float* from = x.data + choices[i].row * up_.k;
        std::memcpy(rows + i * up_.k, from, sizeof(float) * static_cast<size_t>(up_.k));
      }
      Multiply(product, up, expert, rows, count, hidden);
      context.ParallelFor(count, count * up_.n * 4, [&](int64_t i) {
        gate_.Apply(kernels_, hidden + i * up_.n, inner + i * down_.k, up_.n);
      });
      Multiply(product, down, expert, inner, count, made);
      for (int64_t i = 0; i < count; ++i) {
        float* to = y + choices[i].row * down_.n;
        const float* from = made + i * down_.n;
        for (int64_t j = 0; j < down_.n; ++j) to[j] += choices[i].weight * from[j];
      }
    });
  }

 private:
  // One matrix of every expert.
  struct Expert {
    const PackedLayout* layout;
    const uint8_t* weight;
    const float* bias;  // [experts, n] or null
  };

  Expert ReadExpert(const Context& context, size_t at, size_t bias_at,
                    const PackedLayout& layout) const {
    const auto weight = context.Input<uint8_t>(at);
    const auto bias = context.Input<float>(bias_at);
    Require(weight.shape.rank == 1 && weight.shape[0] == count_ * layout.total_bytes(),
            "the packed weights have shape ", weight.shape, " instead of [",
            count_ * layout.total_bytes(), "], the bytes of ", count_, " matrices of ", layout.n,
            " x ", layout.k);
    Require(!bias || (bias.shape.rank == 2 && bias.shape[0] == count_ && bias.shape[1] == layout.n),
            "bias has shape ", bias.shape, " instead of [", count_, ", ", layout.n, "]");
    return {&layout, weight.data, bias.data};
  }

  static void Multiply(const LinearProduct& product, const Expert& matrices, int64_t expert,
                       const float* x, int64_t rows, float* y) {
    const PackedLayout& layout = *matrices.layout;
    LinearInput input;
    input.x = x;
    input.rows = rows;
    LinearLayer layer = {};
    layer.layout = &layout;
    layer.weight = matrices.weight + expert * layout.total_bytes();
    layer.bias = matrices.bias == nullptr ? nullptr : matrices.bias + expert * layout.n;
    layer.y = y;
    product.Run(input, &layer, 1);
  }

  const int64_t count_;
  const PackedLayout up_;
  const PackedLayout down_;
  const Gate gate_;
  const ActivationFormat act_;
  const KernelTable& kernels_;
};

}  // namespace

OperatorSpec QExpertsSpec() {
  const TensorSpec optional = {ort::kFloat, ort::kOptional};
  return {
      "QExperts",
      {{ort::kFloat},
       {ort::kInt64},
       {ort::kFloat},
       {ort::kUint8},
       optional,
       {ort::kUint8},
       optional},
      {{ort::kFloat}},
      [](const Attributes& attributes, const KernelTable& kernels) -> std::unique_ptr<Operator> {
        return std::make_unique<QExperts>(attributes, kernels);
      }};
}

}  // namespace qcompile::cpu
