// Row-wise kernels: norm, gated activation, quantization of activations.
#ifndef QCOMPILE_CPU_ISA_ELEMENTWISE_H_
#define QCOMPILE_CPU_ISA_ELEMENTWISE_H_

#include <math.h>

#include "kernel_table.h"
#include "vector_math.h"

namespace qcompile::cpu {
namespace {

inline int64_t Least(int64_t a, int64_t b) { return a < b ? a : b; }

void RmsNorm(const float* x, const float* weight, float* y, int64_t dim, float epsilon) {
  F even = Zero(), odd = Zero();
  int64_t i = 0;
  for (; i + 32 <= dim; i += 32) {
    const F a = Load(x + i), b = Load(x + i + 16);
    even = Fma(a, a, even);
    odd = Fma(b, b, odd);
  }
  for (; i < dim; i += 16) {
    const F a = LoadN(x + i, Least(16, dim - i));
    even = Fma(a, a, even);
  }
  const float mean = ReduceAdd(even + odd) / static_cast<float>(dim);
  const F factor = Set1(1.0f / sqrtf(mean + epsilon));
  for (i = 0; i < dim; i += 16) {
    const int64_t n = Least(16, dim - i);
    F normed = LoadN(x + i, n) * factor;
    if (weight != nullptr) normed = normed * LoadN(weight + i, n);
    StoreN(y + i, normed, n);
  }
}

template <class Function>
inline void ForGated(const float* gate, const float* up, float* y, int64_t count,
                     Function activation) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) Store(y + i, activation(Load(gate + i)) * Load(up + i));
  if (i < count) {
    const int64_t n = count - i;
    StoreN(y + i, activation(LoadN(gate + i, n)) * LoadN(up + i, n), n);
  }
}

void GatedActivation(Activation kind, const float* gate, const float* up, float* y, int64_t count) {
  switch (kind) {
    case Activation::kSilu:
      return ForGated(gate, up, y, count, [](F x) { return x * Sigmoid(x); });
    case Activation::kGelu:
      return ForGated(gate, up, y, count, [](F x) { return Gelu(x); });
    case Activation::kGeluTanh:
      return ForGated(gate, up, y, count, [](F x) { return GeluTanh(x); });
    case Activation::kRelu:
      return ForGated(gate, up, y, count, [](F x) { return Max(Zero(), x); });
    case Activation::kSigmoid:
      return ForGated(gate, up, y, count, [](F x) { return Sigmoid(x); });
    case Activation::kTanh:
      return ForGated(gate, up, y, count, [](F x) { return Tanh(x); });
    case Activation::kIdentity:
      return ForGated(gate, up, y, count, [](F x) { return x; });
  }
}

// Symmetric codes: scale = max |x| / largest code, or 1 where that is 0. A NaN gives a NaN scale
// and an infinity an infinite one, so that neither is lost in the integers.
inline float MeasuredScale(const float* x, int64_t count, int32_t largest_code) {
  I largest = ZeroI();
  for (int64_t i = 0; i < count; i += 16) {
    largest = Max(largest, AbsBits(LoadN(x + i, Least(16, count - i))));
  }
  const int32_t bits = ReduceMax(largest);
  float magnitude;
  memcpy(&magnitude, &bits, sizeof(magnitude));
  const float scale = magnitude / static_cast<float>(largest_code);
  return scale == 0.0f ? 1.0f : scale;
}

// A true division, so that codes equal those of the reference bit for bit.
struct MeasuredCodes {
  float scale;
  int32_t largest;

  // The scales of the least floats are coarse, so that their codes have to be bounded too.
  I operator()(F x) const {
    return Max(Set1(-largest), Min(Set1(largest), Round(x / Set1(scale))));
  }
};

struct StaticCodes {
  const StaticGrid& grid;

  I operator()(F x) const {
    const F ratio = x / Set1(grid.scale);
    // A NaN is neither above nor below 0.
    const F above = SelectLess(Zero(), ratio, Min(ratio, Set1(grid.most)), Zero());
    const F below = SelectLess(ratio, Zero(), Max(ratio, Set1(grid.least)), Zero());
    return Round(above + below) + Set1(grid.offset);
  }
};

// Codes of one group, and their sum. `padded` is `count` rounded up to 8.
template <class ToCodes>
inline int32_t QuantizeGroup(const float* x, int64_t count, int64_t padded, ToCodes to_codes,
                             int8_t* codes) {
  I sum = ZeroI();
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const I q = to_codes(Load(x + i));
    sum = sum + q;
    StoreInt8(codes + i, q);
  }
  int32_t total = ReduceAdd(sum);
  if (i < count) {
    int8_t tail[16];
    StoreInt8(tail, to_codes(LoadN(x + i, count - i)));
    for (int64_t j = i; j < padded; ++j) {
      const int8_t code = j < count ? tail[j - i] : static_cast<int8_t>(0);
      codes[j] = code;
      total += code;
    }
  }
  return total;
}

void QuantizeActivations(const QuantizeRow& row) {
  float scale = 0.0f;
  if (row.grid != nullptr) {
    scale = row.grid->scale;
  } else if (!row.scale_per_group) {
    scale = MeasuredScale(row.x, row.k, row.largest);
  }
  if (!row.scale_per_group) row.scales[0] = scale;
  for (int64_t begin = 0, g = 0; begin < row.k; begin += row.group_size, ++g) {
    const int64_t count = Least(row.group_size, row.k - begin);
    const bool last = begin + row.group_size >= row.k;
    const int64_t padded = last ? row.padded_k - begin : row.group_size;
    if (row.scale_per_group) {
      scale = MeasuredScale(row.x + begin, count, row.largest);
      row.scales[g] = scale;
    }
    const float* x = row.x + begin;
    int8_t* codes = row.codes + begin;
    row.sums[g] = row.grid != nullptr
                      ? QuantizeGroup(x, count, padded, StaticCodes{*row.grid}, codes)
                      : QuantizeGroup(x, count, padded, MeasuredCodes{scale, row.largest}, codes);
  }
}

}  // namespace
}  // namespace qcompile::cpu

#endif  // QCOMPILE_CPU_ISA_ELEMENTWISE_H_
