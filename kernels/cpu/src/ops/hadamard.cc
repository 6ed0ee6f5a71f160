// Hadamard: an online rotation in front of a quantized layer.
#include <cmath>

#include "operator.h"

namespace qcompile::cpu {
namespace {

// y = x (I kron C kron S) / sqrt(block) over the last axis, in blocks; C is the core, S Sylvester's
// matrix of the order that is left.
class Hadamard : public Operator {
 public:
  Hadamard(const Attributes& attributes, const KernelTable& kernels)
      : block_(attributes.Int("block")), kernels_(kernels) {
    Require(block_ >= 1, "block = ", block_, " is no order of a matrix");
  }

  void Compute(const Context& context) const override {
    const auto x = context.Input<float>(0);
    const auto core = context.Input<float>(1);
    Require(x.shape.rank >= 1 && x.shape[-1] > 0 && x.shape[-1] % block_ == 0, "x has shape ",
            x.shape, ", which blocks of ", block_, " do not divide");
    const int64_t order = core ? core.shape[0] : 1;
    Require(!core || (core.shape.rank == 2 && core.shape[0] == core.shape[1]), "core has shape ",
            core.shape, ", which is not square");
    Require(order == 1 || order % 4 == 0, "no Hadamard matrix has order ", order);
    Require(block_ % order == 0 && IsPowerOfTwo(block_ / order), "block = ", block_,
            " is not a power of two times the core's order, ", order);
    const int64_t n = x.shape[-1];
    float* y = context.Output(0, x.shape).data;
    const int64_t rows = x.shape.Count() / n;
    const float scale = 1.0f / std::sqrt(static_cast<float>(block_));
    context.ParallelFor(rows, rows * n * (8 + order), [&](int64_t r) {
      float* scratch = order == 1 ? nullptr : ScratchFloats(ScratchSlot::kWorker, block_);
      kernels_.hadamard({x.data + r * n, y + r * n, n, block_, order, core.data, scale, scratch});
    });
  }

 private:
  static bool IsPowerOfTwo(int64_t value) { return value > 0 && (value & (value - 1)) == 0; }

  const int64_t block_;
  const KernelTable& kernels_;
};

}  // namespace

OperatorSpec HadamardSpec() {
  return {
      "Hadamard",
      {{ort::kFloat}, {ort::kFloat, ort::kOptional}},
      {{ort::kFloat}},
      [](const Attributes& attributes, const KernelTable& kernels) -> std::unique_ptr<Operator> {
        return std::make_unique<Hadamard>(attributes, kernels);
      }};
}

}  // namespace qcompile::cpu
