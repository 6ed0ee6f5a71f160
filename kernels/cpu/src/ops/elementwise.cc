// RmsNorm and GatedActivation.
#include <algorithm>

#include "activation.h"

namespace qcompile::cpu {
namespace {

// y = x / sqrt(mean(x^2) + epsilon) * weight over the last axis.
class RmsNorm : public Operator {
 public:
  RmsNorm(const Attributes& attributes, const KernelTable& kernels)
      : epsilon_(attributes.Float("epsilon", 1e-6f)), kernels_(kernels) {
    Require(epsilon_ >= 0.0f, "epsilon is negative");
  }

  void Compute(const Context& context) const override {
    const auto x = context.Input<float>(0);
    const auto weight = context.Input<float>(1);
    Require(x.shape.rank >= 1 && x.shape[-1] > 0, "x has shape ", x.shape,
            ", which has no last axis to norm");
    const int64_t dim = x.shape[-1];
    Require(!weight || (weight.shape.rank == 1 && weight.shape[0] == dim), "weight has shape ",
            weight.shape, " instead of [", dim, "]");
    float* y = context.Output(0, x.shape).data;
    const int64_t rows = x.shape.Count() / dim;
    context.ParallelFor(rows, rows * dim * 4, [&](int64_t r) {
      kernels_.rms_norm(x.data + r * dim, weight.data, y + r * dim, dim, epsilon_);
    });
  }

 private:
  const float epsilon_;
  const KernelTable& kernels_;
};

// y = activation(gate) * up.
class GatedActivation : public Operator {
 public:
  GatedActivation(const Attributes& attributes, const KernelTable& kernels)
      : kind_(ReadActivation(attributes)), kernels_(kernels) {}

  void Compute(const Context& context) const override {
    const auto gate = context.Input<float>(0);
    const auto up = context.Input<float>(1);
    Require(gate.shape == up.shape, "gate has shape ", gate.shape, ", but up has ", up.shape);
    float* y = context.Output(0, gate.shape).data;
    constexpr int64_t kPiece = 4096;
    const int64_t count = gate.shape.Count();
    context.ParallelFor((count + kPiece - 1) / kPiece, count * 8, [&](int64_t piece) {
      const int64_t begin = piece * kPiece;
      kernels_.gated_activation(kind_, gate.data + begin, up.data + begin, y + begin,
                                std::min(kPiece, count - begin));
    });
  }

 private:
  const Activation kind_;
  const KernelTable& kernels_;
};

}  // namespace

OperatorSpec RmsNormSpec() {
  return {
      "RmsNorm",
      {{ort::kFloat}, {ort::kFloat, ort::kOptional}},
      {{ort::kFloat}},
      [](const Attributes& attributes, const KernelTable& kernels) -> std::unique_ptr<Operator> {
        return std::make_unique<RmsNorm>(attributes, kernels);
      }};
}

OperatorSpec GatedActivationSpec() {
  return {
      "GatedActivation",
      {{ort::kFloat}, {ort::kFloat}},
      {{ort::kFloat}},
      [](const Attributes& attributes, const KernelTable& kernels) -> std::unique_ptr<Operator> {
        return std::make_unique<GatedActivation>(attributes, kernels);
      }};
}

}  // namespace qcompile::cpu
