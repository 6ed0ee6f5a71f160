// Linear layers that read one input, which may be normed first: QLinears, and QGatedLinear.
//
// The input is normed and rounded once, the threads are woken once, and what a gate multiplies is
// still in the cache when it does. Results are those of RmsNorm, QLinear and GatedActivation, bit
// for bit.
#include <array>

#include "activation.h"
#include "linear_product.h"

namespace qcompile::cpu {
namespace {

constexpr int64_t kMostLayers = 3;

// Inputs of both: x, norm_weight?, then weight and bias? of every layer, and at last the grid of
// static activations.
constexpr size_t kX = 0, kNormWeight = 1, kFirstWeight = 2, kInputsPerLayer = 2;

constexpr size_t GridBehind(int64_t layers) {
  return kFirstWeight + kInputsPerLayer * static_cast<size_t>(layers);
}

// The attributes of both: one layout but for N, what becomes of the activations, and the norm.
class SharedInput {
 public:
  SharedInput(const Attributes& attributes, const KernelTable& kernels)
      : format_(ReadActivationFormat(attributes)),
        normed_(attributes.Int("normed", 0) != 0),
        epsilon_(attributes.Float("epsilon", 0.0f)),
        kernels_(kernels) {
    Require(epsilon_ >= 0.0f, "epsilon is negative");
  }

  ActivationFormat format() const { return format_; }

  LinearInput Read(const Context& context, int64_t k, int64_t layers, Shape* shape) const {
    const auto x = context.Input<float>(kX);
    *shape = OutputShape(x.shape, k, k);
    const auto norm_weight = context.Input<float>(kNormWeight);
    Require(!norm_weight || normed_, "norm_weight is given, but normed is 0");
    RequireVector("norm_weight", norm_weight, k);
    const StaticGrid grid = ReadGrid(context, GridBehind(layers), format_);
    return {x.data, x.shape.Count() / k, normed_, norm_weight.data, epsilon_, grid};
  }

  LinearLayer ReadLayer(const Context& context, size_t index, const PackedLayout& layout) const {
    const size_t at = kFirstWeight + kInputsPerLayer * index;
    const auto weight = context.Input<uint8_t>(at);
    const auto bias = context.Input<float>(at + 1);
    Require(bool{weight}, "weight ", static_cast<int64_t>(index), " is missing");
    RequireVector("bias", bias, layout.n);
    return {&layout, StreamedWeight(weight, layout, pages_[index]), bias.data, nullptr, nullptr};
  }

  LinearProduct Product(const Context& context) const {
    return LinearProduct(context, kernels_, format_);
  }

 private:
  std::array<HugePages, kMostLayers> pages_;
  const ActivationFormat format_;
  const bool normed_;
  const float epsilon_;
  const KernelTable& kernels_;
};

// y_i = norm(x) . weight_i^T + bias_i.
class QLinears : public Operator {
 public:
  QLinears(const Attributes& attributes, const KernelTable& kernels) : input_(attributes, kernels) {
    static constexpr const char* kSizes[kMostLayers] = {"N0", "N1", "N2"};
    count_ = attributes.Int("count");
    Require(count_ >= 1 && count_ <= kMostLayers, "count = ", count_, " is not 1 to ", kMostLayers);
    for (int64_t i = 0; i < count_; ++i) {
      layouts_[i] = ReadLayout(attributes, kSizes[i]);
      RequireProduct(layouts_[i], input_.format());
    }
  }

  void Compute(const Context& context) const override {
    Shape shape;
    const LinearInput input = input_.Read(context, layouts_[0].k, kMostLayers, &shape);
    std::array<LinearLayer, kMostLayers> layers;
    for (int64_t i = 0; i < count_; ++i) {
      const auto index = static_cast<size_t>(i);
      layers[index] = input_.ReadLayer(context, index, layouts_[index]);
      shape.dims[shape.rank - 1] = layouts_[index].n;
      layers[index].y = context.Output(index, shape).data;
      Require(layers[index].y != nullptr, "output ", i, " is missing");
    }
    input_.Product(context).Run(input, layers.data(), count_);
  }

 private:
  const SharedInput input_;
  int64_t count_;
  std::array<PackedLayout, kMostLayers> layouts_;
};

// y = activation(norm(x) . gate^T + gate_bias) * (norm(x) . up^T + up_bias).
class QGatedLinear : public Operator {
 public:
  QGatedLinear(const Attributes& attributes, const KernelTable& kernels)
      : input_(attributes, kernels),
        layout_(ReadLayout(attributes)),
        kind_(ReadActivation(attributes)) {
    RequireProduct(layout_, input_.format());
  }

  void Compute(const Context& context) const override {
    Shape shape;
    const LinearInput input = input_.Read(context, layout_.k, 2, &shape);
    const LinearLayer gate = input_.ReadLayer(context, 0, layout_);
    LinearLayer up = input_.ReadLayer(context, 1, layout_);
    shape.dims[shape.rank - 1] = layout_.n;
    up.y = context.Output(0, shape).data;
    input_.Product(context).RunGated(input, gate, up, kind_);
  }

 private:
  const SharedInput input_;
  const PackedLayout layout_;
  const Activation kind_;
};

template <class Op>
std::unique_ptr<Operator> Make(const Attributes& attributes, const KernelTable& kernels) {
  return std::make_unique<Op>(attributes, kernels);
}

const TensorSpec kOptionalFloat = {ort::kFloat, ort::kOptional};
const TensorSpec kOptionalBytes = {ort::kUint8, ort::kOptional};

}  // namespace

OperatorSpec QLinearsSpec() {
  return {"QLinears",
          {{ort::kFloat},
           kOptionalFloat,
           {ort::kUint8},
           kOptionalFloat,
           kOptionalBytes,
           kOptionalFloat,
           kOptionalBytes,
           kOptionalFloat,
           kOptionalFloat},
          {{ort::kFloat}, kOptionalFloat, kOptionalFloat},
          Make<QLinears>};
}

OperatorSpec QGatedLinearSpec() {
  return {"QGatedLinear",
          {{ort::kFloat},
           kOptionalFloat,
           {ort::kUint8},
           kOptionalFloat,
           {ort::kUint8},
           kOptionalFloat,
           kOptionalFloat},
          {{ort::kFloat}},
          Make<QGatedLinear>};
}

}  // namespace qcompile::cpu
