// QLinear: y[..., N] = x[..., K] . weight[N, K]^T + bias + residual, with a packed weight. Inputs:
// x, weight, bias?, residual?, and the grid of static activations.
#include "linear_product.h"

namespace qcompile::cpu {
namespace {

constexpr size_t kGrid = 4;

class QLinear : public Operator {
 public:
  QLinear(const Attributes& attributes, const KernelTable& kernels)
      : layout_(ReadLayout(attributes)),
        format_(ReadActivationFormat(attributes)),
        kernels_(kernels) {
    RequireProduct(layout_, format_);
  }

  void Compute(const Context& context) const override {
    const auto x = context.Input<float>(0);
    const Shape shape = OutputShape(x.shape, layout_.n, layout_.k);
    const auto weight = context.Input<uint8_t>(1);
    const auto bias = context.Input<float>(2);
    const auto residual = context.Input<float>(3);
    RequireVector("bias", bias, layout_.n);
    Require(!residual || residual.shape == shape, "residual has shape ", residual.shape,
            ", but the output has ", shape);
    LinearInput input;
    input.x = x.data;
    input.rows = x.shape.Count() / layout_.k;
    input.grid = ReadGrid(context, kGrid, format_);
    const LinearLayer layer = {&layout_, StreamedWeight(weight, layout_, pages_), bias.data,
                               residual.data, context.Output(0, shape).data};
    LinearProduct(context, kernels_, format_).Run(input, &layer, 1);
  }

 private:
  const PackedLayout layout_;
  const HugePages pages_;
  const ActivationFormat format_;
  const KernelTable& kernels_;
};

}  // namespace

OperatorSpec QLinearSpec() {
  return {
      "QLinear",
      {{ort::kFloat},
       {ort::kUint8},
       {ort::kFloat, ort::kOptional},
       {ort::kFloat, ort::kOptional},
       {ort::kFloat, ort::kOptional}},
      {{ort::kFloat}},
      [](const Attributes& attributes, const KernelTable& kernels) -> std::unique_ptr<Operator> {
        return std::make_unique<QLinear>(attributes, kernels);
      }};
}

}  // namespace qcompile::cpu
