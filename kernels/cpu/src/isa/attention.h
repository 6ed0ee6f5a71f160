// Softmax attention in one pass over the keys, with a running maximum and sum per row.
#ifndef QCOMPILE_CPU_ISA_ATTENTION_H_
#define QCOMPILE_CPU_ISA_ATTENTION_H_

#include <math.h>

#include <cstring>

#include "elementwise.h"
#include "gemm.h"
#include "kernel_table.h"
#include "vector_math.h"

namespace qcompile::cpu {
namespace {

struct KeyRange {
  int64_t begin, end;
};

// The keys that causality and window let row `row` see.
inline KeyRange VisibleKeys(const AttentionTile& t, int64_t row) {
  const int64_t position = t.first_position + (t.rows_are_heads ? 0 : row);
  int64_t begin = t.window > 0 ? position - t.window + 1 : 0;
  if (begin < 0) begin = 0;
  const int64_t end = t.causal ? Least(t.total, position + 1) : t.total;
  return {begin, end};
}

// scores[row][key] for few rows: one dot product each.
inline void ScoreByDots(const AttentionTile& t, int64_t first, int64_t count, float* scores) {
  for (int64_t j = 0; j < count; ++j) {
    const float* key = t.keys + (first + j) * t.key_stride;
    for (int64_t r = 0; r < t.rows; ++r) {
      const float* q = t.q + r * t.q_stride;
      F even = Zero(), odd = Zero();
      int64_t d = 0;
      for (; d + 32 <= t.head_dim; d += 32) {
        even = Fma(Load(q + d), Load(key + d), even);
        odd = Fma(Load(q + d + 16), Load(key + d + 16), odd);
      }
      for (; d < t.head_dim; d += 16) {
        const int64_t n = Least(16, t.head_dim - d);
        even = Fma(LoadN(q + d, n), LoadN(key + d, n), even);
      }
      scores[r * kAttentionKeys + j] = ReduceAdd(even + odd);
    }
  }
}

// Keys `first`.. to [head_dim][kAttentionKeys], with zeros after the last.
inline void TransposeKeys(const AttentionTile& t, int64_t first, int64_t count, float* out) {
  if (count < kAttentionKeys) memset(out, 0, sizeof(float) * t.head_dim * kAttentionKeys);
  for (int64_t j = 0; j < count; j += 16) {
    const float* keys = t.keys + (first + j) * t.key_stride;
    const int64_t n = Least(16, count - j);
    int64_t d = 0;
    if (n == 16) {
      for (; d + 16 <= t.head_dim; d += 16) {
        Transpose16(keys + d, t.key_stride, out + d * kAttentionKeys + j, kAttentionKeys);
      }
    }
    for (; d < t.head_dim; ++d) {
      for (int64_t i = 0; i < n; ++i) {
        out[d * kAttentionKeys + j + i] = keys[i * t.key_stride + d];
      }
    }
  }
}

// scores[row][key] for many rows: transposed keys make it a product with keys across lanes.
inline void ScoreByGemm(const AttentionTile& t, int64_t first, int64_t count, float* transposed,
                        float* scores) {
  TransposeKeys(t, first, count, transposed);
  memset(scores, 0, sizeof(float) * t.rows * kAttentionKeys);
  const Gemm product = {t.q,    t.q_stride,     transposed, kAttentionKeys,
                        scores, kAttentionKeys, t.head_dim};
  GemmAccumulate(product, t.rows, PadTo16(count));
}

// Scale, soft cap, bias and masks of one row's scores, in place; returns their maximum.
inline float FinishScores(const AttentionTile& t, int64_t row, int64_t first, int64_t count,
                          float* scores) {
  static constexpr float kLanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const F hidden = Set1(-INFINITY);
  const KeyRange visible = VisibleKeys(t, row);
  const F begin = Set1(static_cast<float>(visible.begin - first));
  const F end = Set1(static_cast<float>(Least(visible.end - first, count)));
  F largest = hidden;
  for (int64_t j = 0; j < count; j += 16) {
    const int64_t n = Least(16, count - j);
    F s = Load(scores + j) * Set1(t.scale);
    if (t.softcap != 0.0f) s = Set1(t.softcap) * Tanh(s / Set1(t.softcap));
    if (t.bias != nullptr) s = s + LoadN(t.bias + row * t.bias_stride + first + j, n);
    const F lane = Load(kLanes) + Set1(static_cast<float>(j));
    s = SelectLess(lane, end, SelectLess(lane, begin, hidden, s), hidden);
    if (t.mask != nullptr) s = SelectLess(Zero(), LoadN(t.mask + first + j, n), s, hidden);
    Store(scores + j, s);
    largest = Max(largest, s);
  }
  return ReduceMax(largest);
}

void Attention(const AttentionTile& t) {
  const int64_t value_stride = PadTo16(t.value_dim);
  float* transposed = t.scratch;
  float* scores = transposed + t.head_dim * kAttentionKeys;
  float* sums = scores + kAttentionRows * kAttentionKeys;
  float* largest = sums + kAttentionRows * value_stride;
  float* weight = largest + kAttentionRows;

  memset(sums, 0, sizeof(float) * t.rows * value_stride);
  KeyRange all = {t.total, 0};
  for (int64_t r = 0; r < t.rows; ++r) {
    // A sink is a key with this logit and no value.
    largest[r] = t.sinks != nullptr ? t.sinks[r * t.sinks_stride] : -INFINITY;
    weight[r] = t.sinks != nullptr ? 1.0f : 0.0f;
    const KeyRange visible = VisibleKeys(t, r);
    if (visible.begin < all.begin) all.begin = visible.begin;
    if (visible.end > all.end) all.end = visible.end;
  }

  // Steps start at multiples of their length, so that the order of sums depends on positions only.
  int64_t first = all.begin / kAttentionKeys * kAttentionKeys;
  for (; first < all.end; first += kAttentionKeys) {
    const int64_t count = Least(kAttentionKeys, all.end - first);
    if (t.rows < 4) {
      ScoreByDots(t, first, count, scores);
    } else {
      ScoreByGemm(t, first, count, transposed, scores);
    }
    for (int64_t r = 0; r < t.rows; ++r) {
      float* s = scores + r * kAttentionKeys;
      const float step = FinishScores(t, r, first, count, s);
      const float before = largest[r];
      const float now = before > step ? before : step;
      // Nothing visible yet: any finite shift turns -infinity into 0, and NaN into NaN.
      const F shift = Set1(now == -INFINITY ? 0.0f : now);
      float fade[16];
      Store(fade, Exp(Set1(before) - shift));
      F total = Zero();
      for (int64_t j = 0; j < count; j += 16) {
        const F p = Exp(Load(s + j) - shift);
        Store(s + j, p);
        total = total + p;
      }
      largest[r] = now;
      weight[r] = weight[r] * fade[0] + ReduceAdd(total);
      if (fade[0] != 1.0f) {
        for (int64_t d = 0; d < value_stride; d += 16) {
          float* sum = sums + r * value_stride + d;
          Store(sum, Load(sum) * Set1(fade[0]));
        }
      }
    }
    const Gemm product = {scores,         kAttentionKeys, t.values + first * t.value_stride,
                          t.value_stride, sums,           value_stride,
                          count};
    GemmAccumulate(product, t.rows, t.value_dim);
  }

  for (int64_t r = 0; r < t.rows; ++r) {
    const float factor = weight[r] == 0.0f ? 0.0f : 1.0f / weight[r];
    for (int64_t d = 0; d < t.value_dim; d += 16) {
      StoreN(t.out + r * t.out_stride + d, Load(sums + r * value_stride + d) * Set1(factor),
             Least(16, t.value_dim - d));
    }
  }
}

}  // namespace
}  // namespace qcompile::cpu

#endif  // QCOMPILE_CPU_ISA_ATTENTION_H_
