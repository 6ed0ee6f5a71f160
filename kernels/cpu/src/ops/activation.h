// The attribute that names an activation.
#ifndef QCOMPILE_CPU_OPS_ACTIVATION_H_
#define QCOMPILE_CPU_OPS_ACTIVATION_H_

#include <utility>

#include "operator.h"

namespace qcompile::cpu {

inline Activation ReadActivation(const Attributes& attributes) {
  static constexpr std::pair<const char*, Activation> kKinds[] = {
      {"silu", Activation::kSilu},          {"gelu", Activation::kGelu},
      {"gelu_tanh", Activation::kGeluTanh}, {"relu", Activation::kRelu},
      {"sigmoid", Activation::kSigmoid},    {"tanh", Activation::kTanh},
      {"identity", Activation::kIdentity},
  };
  const std::string kind = attributes.String("kind", "silu");
  for (const auto& [name, value] : kKinds) {
    if (kind == name) return value;
  }
  Fail("kind = '", kind, "' is none of silu, gelu, gelu_tanh, relu, sigmoid, tanh, identity");
}

}  // namespace qcompile::cpu

#endif  // QCOMPILE_CPU_OPS_ACTIVATION_H_
