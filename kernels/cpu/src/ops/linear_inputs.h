// What every operator over a weight [N, K] asks of its attributes and inputs.
#ifndef QCOMPILE_CPU_OPS_LINEAR_INPUTS_H_
#define QCOMPILE_CPU_OPS_LINEAR_INPUTS_H_

#include "operator.h"

namespace qcompile::cpu {

struct WeightSize {
  int64_t n, k;
};

// From the attributes `rows` and "K", whose names may have a prefix.
inline WeightSize ReadSize(const Attributes& attributes, const char* rows = "N",
                           const std::string& prefix = "") {
  constexpr int64_t kMostElements = int64_t{1} << 40;  // keeps every size within int64
  const WeightSize size = {attributes.Int((prefix + rows).c_str()),
                           attributes.Int((prefix + "K").c_str())};
  Require(size.n > 0 && size.k > 0 && size.n < kMostElements && size.k < kMostElements &&
              size.n <= kMostElements / size.k,
          rows, " = ", size.n, " and K = ", size.k, " are no size of a weight");
  return size;
}

// The shape of the output for an input of [..., K].
inline Shape OutputShape(const Shape& x, int64_t n, int64_t k) {
  Require(x.rank >= 1 && x[-1] == k, "x has shape ", x, ", but K = ", k);
  Shape shape = x;
  shape.dims[shape.rank - 1] = n;
  return shape;
}

// Throws unless an input that may be missing is a vector of a size.
inline void RequireVector(const char* name, const Tensor<const float>& vector, int64_t size) {
  Require(!vector || (vector.shape.rank == 1 && vector.shape[0] == size), name, " has shape ",
          vector.shape, " instead of [", size, "]");
}

// A packed weight of so many bytes; `details` say in an error why there are as many.
template <class... Details>
const uint8_t* CheckedBytes(const Tensor<const uint8_t>& weight, int64_t bytes,
                            const Details&... details) {
  Require(weight.shape.rank == 1 && weight.shape[0] == bytes, "the packed weight has shape ",
          weight.shape, " instead of [", bytes, "]", details...);
  return weight.data;
}

}  // namespace qcompile::cpu

#endif  // QCOMPILE_CPU_OPS_LINEAR_INPUTS_H_
