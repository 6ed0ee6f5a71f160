// Softmax attention in one pass over the keys, with a running maximum and sum per row.
#ifndef QCOMPILE_CPU_ISA_ATTENTION_H_
#define QCOMPILE_CPU_ISA_ATTENTION_H_

#include <math.h>

#include <cstring>

#include "cache_codec.h"
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

// Some positions as floats, one behind the other.
struct Floats {
  const float* data;
  int64_t stride;
};

void DecodeCacheRows(const CacheRows& rows, int64_t first, int64_t count, float* out) {
  const uint8_t* begin = rows.data + first * rows.stride;
  for (int64_t j = 0; j < count; ++j) {
    DecodeCacheRow(rows.row, begin + j * rows.stride, out + j * rows.row.width);
  }
}

// `count` positions from `first` on: as they are, or decoded to `scratch`.
inline Floats Read(const CacheRows& rows, int64_t first, int64_t count, float* scratch) {
  const uint8_t* begin = rows.data + first * rows.stride;
  if (rows.row.format == CacheFormat::kFloat) {
    return {reinterpret_cast<const float*>(begin), rows.stride / int64_t{sizeof(float)}};
  }
  DecodeCacheRows(rows, first, count, scratch);
  return {scratch, rows.row.width};
}

// Asks for positions that will be read soon: the rows of a step are few pages, at whose ends the
// machine's own prefetching stops.
inline void Prefetch(const CacheRows& rows, int64_t first, int64_t count) {
  constexpr int64_t kLine = 64;
  if (rows.stride > rows.row.bytes()) return;  // beside those of other heads
  const uint8_t* begin = rows.data + first * rows.stride;
  for (int64_t at = 0; at < count * rows.stride; at += kLine) __builtin_prefetch(begin + at);
}

// scores[row][key] for kRows rows: as many keys at a time as give sixteen sums.
template <int kRows>
inline void ScoreRows(const AttentionTile& t, int64_t row, const Floats& keys, int64_t count,
                      float* scores) {
  constexpr int64_t kKeys = 16 / kRows;
  const float* q = t.q + row * t.q_stride;
  F sums[16];
  for (F& sum : sums) sum = Zero();
  for (int64_t j = 0; j < count; j += kKeys) {
    const int64_t n = Least(kKeys, count - j);
    for (int64_t i = 0; i < n; ++i) {
      const float* key = keys.data + (j + i) * keys.stride;
      F sum[kRows];
      for (F& s : sum) s = Zero();
      int64_t d = 0;
      for (; d + 16 <= t.head_dim; d += 16) {
        const F k = Load(key + d);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) sum[r] = Fma(Load(q + r * t.q_stride + d), k, sum[r]);
      }
      if (d < t.head_dim) {
        const int64_t rest = t.head_dim - d;
        const F k = LoadN(key + d, rest);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          sum[r] = Fma(LoadN(q + r * t.q_stride + d, rest), k, sum[r]);
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) sums[r * kKeys + i] = sum[r];
    }
    float found[16];
    Store(found, ReduceAdd16(sums));
    for (int64_t r = 0; r < kRows; ++r) {
      memcpy(scores + (row + r) * kAttentionKeys + j, found + r * kKeys, sizeof(float) * n);
    }
  }
}

// scores[row][key] for few rows: one dot product each.
inline void ScoreByDots(const AttentionTile& t, const Floats& keys, int64_t count, float* scores) {
  int64_t row = 0;
  for (; row + 4 <= t.rows; row += 4) ScoreRows<4>(t, row, keys, count, scores);
  switch (t.rows - row) {
    case 3:
      return ScoreRows<3>(t, row, keys, count, scores);
    case 2:
      return ScoreRows<2>(t, row, keys, count, scores);
    case 1:
      return ScoreRows<1>(t, row, keys, count, scores);
    default:
      return;
  }
}

// Keys to [head_dim][kAttentionKeys], with zeros after the last.
inline void TransposeKeys(const Floats& keys, int64_t head_dim, int64_t count, float* out) {
  if (count < kAttentionKeys) memset(out, 0, sizeof(float) * head_dim * kAttentionKeys);
  for (int64_t j = 0; j < count; j += 16) {
    const float* block = keys.data + j * keys.stride;
    const int64_t n = Least(16, count - j);
    int64_t d = 0;
    if (n == 16) {
      for (; d + 16 <= head_dim; d += 16) {
        Transpose16(block + d, keys.stride, out + d * kAttentionKeys + j, kAttentionKeys);
      }
    }
    for (; d < head_dim; ++d) {
      for (int64_t i = 0; i < n; ++i) out[d * kAttentionKeys + j + i] = block[i * keys.stride + d];
    }
  }
}

void PackKeys(const CacheRows& keys, int64_t first, int64_t count, float* scratch, float* out) {
  TransposeKeys(Read(keys, first, count, scratch), keys.row.width, count, out);
}

// scores[row][key] for many rows: transposed keys make it a product with keys across lanes.
inline void ScoreByGemm(const AttentionTile& t, const float* transposed, int64_t count,
                        float* scores) {
  memset(scores, 0, sizeof(float) * t.rows * kAttentionKeys);
  const Gemm product = {t.q,    t.q_stride,     transposed, kAttentionKeys,
                        scores, kAttentionKeys, t.head_dim};
  GemmAccumulate(product, t.rows, PadTo16(count));
}

// Whether scores need nothing but their scale: 16 at a time, all visible.
inline bool IsPlain(const AttentionTile& t, const KeyRange& visible, int64_t first, int64_t count) {
  return t.softcap == 0.0f && t.bias == nullptr && t.mask == nullptr && count % 16 == 0 &&
         visible.begin <= first && first + count <= visible.end;
}

// Scale, soft cap, bias and masks of one row's scores, in place; returns their maximum.
inline float FinishScores(const AttentionTile& t, int64_t row, int64_t first, int64_t count,
                          float* scores) {
  static constexpr float kLanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const F hidden = Set1(-INFINITY);
  const KeyRange visible = VisibleKeys(t, row);
  F largest = hidden;
  if (IsPlain(t, visible, first, count)) {
    for (int64_t j = 0; j < count; j += 16) {
      const F s = Load(scores + j) * Set1(t.scale);
      Store(scores + j, s);
      largest = Max(largest, s);
    }
    return ReduceMax(largest);
  }
  const F begin = Set1(static_cast<float>(visible.begin - first));
  const F end = Set1(static_cast<float>(Least(visible.end - first, count)));
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

inline void WritePart(const AttentionTile& t, const float* sums, const float* weight,
                      const float* largest) {
  const int64_t value_stride = PadTo16(t.value_dim);
  for (int64_t r = 0; r < t.rows; ++r) {
    float* part = t.part + r * AttentionPartFloats(t.value_dim);
    memcpy(part, sums + r * value_stride, sizeof(float) * value_stride);
    part[value_stride] = weight[r];
    part[value_stride + 1] = largest[r];
  }
}

void Attention(const AttentionTile& t) {
  const int64_t value_stride = PadTo16(t.value_dim);
  float* transposed = t.scratch;
  float* decoded_keys = transposed + t.head_dim * kAttentionKeys;
  float* decoded_values = decoded_keys + t.head_dim * kAttentionKeys;
  float* scores = decoded_values + t.value_dim * kAttentionKeys;
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
  if (all.begin < t.key_begin) all.begin = t.key_begin;
  all.end = Least(all.end, t.key_end);

  // Steps start at multiples of their length, so that the order of sums depends on positions only.
  int64_t first = all.begin / kAttentionKeys * kAttentionKeys;
  for (; first < all.end; first += kAttentionKeys) {
    const int64_t count = Least(kAttentionKeys, all.end - first);
    if (t.rows_are_heads) {
      Prefetch(t.values, first, count);
      const int64_t next = first + kAttentionKeys;
      if (next < all.end) Prefetch(t.keys, next, Least(kAttentionKeys, all.end - next));
    }
    if (t.key_panels != nullptr) {
      ScoreByGemm(t, t.key_panels + first * t.head_dim, count, scores);
    } else {
      const Floats keys = Read(t.keys, first, count, decoded_keys);
      if (t.rows < kManyQueries) {
        ScoreByDots(t, keys, count, scores);
      } else {
        TransposeKeys(keys, t.head_dim, count, transposed);
        ScoreByGemm(t, transposed, count, scores);
      }
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
    const Floats values = Read(t.values, first, count, decoded_values);
    const Gemm product = {scores, kAttentionKeys, values.data, values.stride,
                          sums,   value_stride,   count};
    GemmAccumulate(product, t.rows, t.value_dim);
  }
  if (t.part != nullptr) return WritePart(t, sums, weight, largest);

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
