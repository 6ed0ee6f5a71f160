// Products with weights whose codes stand for vectors of a codebook.
//
// A few rows of the weight become floats, which stay in the first-level cache, and are multiplied
// with every row of activations. Each output is one sum of 16 lanes along K, whatever else is
// computed beside it: results do not depend on how the work was split.
#ifndef QCOMPILE_CPU_ISA_VECTOR_LINEAR_H_
#define QCOMPILE_CPU_ISA_VECTOR_LINEAR_H_

#include <cstring>

#include "elementwise.h"

namespace qcompile::cpu {
namespace {

// The vectors of a row of codes, one behind the other. kDimension is that of the codebook, or 0
// for any.
template <int kDimension>
void CopyVectors(const VectorTile& t, const uint8_t* codes, float* out) {
  constexpr int64_t kTogether = 8;  // as many codes are whole bytes
  const int64_t dimension = kDimension == 0 ? t.dimension : kDimension;
  const int64_t count = t.k / dimension, bytes = (count * t.bits + 7) / 8;
  const uint64_t mask = (uint64_t{1} << t.bits) - 1;
  const auto copy = [&](uint64_t code) __attribute__((always_inline)) {
    memcpy(out, t.codebook + code * dimension, sizeof(float) * dimension);
    out += dimension;
  };
  int64_t i = 0;
  for (int64_t at = 0; at + int64_t{sizeof(uint64_t)} <= bytes && i + kTogether <= count;
       i += kTogether, at += t.bits) {
    uint64_t word;
    memcpy(&word, codes + at, sizeof(word));
#pragma GCC unroll 8
    for (int64_t j = 0; j < kTogether; ++j, word >>= t.bits) copy(word & mask);
  }
  for (; i < count; ++i) {
    const int64_t bit = i * t.bits;
    const uint64_t word = codes[bit / 8] | static_cast<uint64_t>(codes[bit / 8 + 1]) << 8;
    copy(word >> bit % 8 & mask);
  }
}

// One row of the weight.
inline void DecodeVectors(const VectorTile& t, int64_t column, float* out) {
  const uint8_t* codes = t.codes + column * t.row_bytes;
  switch (t.dimension) {
    case 1:
      CopyVectors<1>(t, codes, out);
      break;
    case 2:
      CopyVectors<2>(t, codes, out);
      break;
    case 4:
      CopyVectors<4>(t, codes, out);
      break;
    default:
      CopyVectors<0>(t, codes, out);
  }
  const float* scales = t.scales + column * t.groups();
  for (int64_t begin = 0; begin < t.k; begin += t.group_size) {
    const F scale = Set1(*scales++);
    const int64_t end = Least(t.k, begin + t.group_size);
    int64_t k = begin;
    for (; k + 16 <= end; k += 16) Store(out + k, Load(out + k) * scale);
    if (k < end) StoreN(out + k, LoadN(out + k, end - k) * scale, end - k);
  }
}

// kRows rows of x from `row` on, by kWeights decoded rows of the weight from `column` on.
template <int kRows, int kWeights>
void MultiplyDecoded(const VectorTile& t, int64_t row, int64_t column, const float* weights) {
  F sum[kRows][kWeights];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kWeights; ++c) sum[r][c] = Zero();
  }
  const float* x = t.x + row * t.k;
  const auto add = [&](int64_t k, auto load) __attribute__((always_inline)) {
    F w[kWeights];
#pragma GCC unroll 4
    for (int c = 0; c < kWeights; ++c) w[c] = load(weights + c * t.k + k);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const F a = load(x + r * t.k + k);
#pragma GCC unroll 4
      for (int c = 0; c < kWeights; ++c) sum[r][c] = Fma(a, w[c], sum[r][c]);
    }
  };
  int64_t k = 0;
  for (; k + 16 <= t.k; k += 16) add(k, [](const float* p) { return Load(p); });
  const int64_t rest = t.k - k;
  if (rest > 0) add(k, [&](const float* p) { return LoadN(p, rest); });
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kWeights; ++c) {
      const float bias = t.bias == nullptr ? 0.0f : t.bias[column + c];
      t.y[(row + r) * t.y_stride + column + c] = ReduceAdd(sum[r][c]) + bias;
    }
  }
}

template <int kWeights>
void MultiplyVectors(const VectorTile& t, int64_t column) {
  for (int c = 0; c < kWeights; ++c) DecodeVectors(t, column + c, t.scratch + c * t.k);
  int64_t row = 0;
  for (; row + kVectorRows <= t.rows; row += kVectorRows) {
    MultiplyDecoded<kVectorRows, kWeights>(t, row, column, t.scratch);
  }
  for (; row < t.rows; ++row) MultiplyDecoded<1, kWeights>(t, row, column, t.scratch);
}

static_assert(kVectorWeights <= kVectorScratchRows);

void LinearVectors(const VectorTile& t) {
  int64_t column = 0;
  for (; column + kVectorWeights <= t.columns; column += kVectorWeights) {
    MultiplyVectors<kVectorWeights>(t, column);
  }
  for (; column < t.columns; ++column) MultiplyVectors<1>(t, column);
}

}  // namespace
}  // namespace qcompile::cpu

#endif  // QCOMPILE_CPU_ISA_VECTOR_LINEAR_H_
