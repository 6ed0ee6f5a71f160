// What an attention node is asked: its attributes and inputs, checked.
#ifndef QCOMPILE_CPU_OPS_ATTENTION_INPUTS_H_
#define QCOMPILE_CPU_OPS_ATTENTION_INPUTS_H_

#include "operator.h"

namespace qcompile::cpu {

// How caches are passed: as floats, or as rows of bytes.
enum class Cache { kFloats, kBytes };

struct AttentionSettings {
  Cache cache;
  int64_t heads, kv_heads;
  float scale;  // NaN: 1 / sqrt(head_dim)
  bool causal;
  int64_t window;
  float softcap;
  int64_t rotary_dim;
  bool interleaved;
  // Of caches of bytes.
  CacheFormat key_format = CacheFormat::kFloat, value_format = CacheFormat::kFloat;
  int64_t key_group_size = 0, value_group_size = 0;  // 0: one group

  CacheRow KeyRow(int64_t width) const { return Row(key_format, key_group_size, width); }
  CacheRow ValueRow(int64_t width) const { return Row(value_format, value_group_size, width); }

 private:
  static CacheRow Row(CacheFormat format, int64_t group_size, int64_t width) {
    if (group_size == 0 || group_size > width) group_size = width;
    return {format, width, group_size, (width + group_size - 1) / group_size};
  }
};

// A rotary table: row (batch, token) has `half` angles.
struct RotaryTable {
  const float* cos = nullptr;
  const float* sin = nullptr;
  int64_t batch_stride = 0;
  int64_t half = 0;
  bool interleaved = false;
};

// The checked inputs of one call.
struct AttentionProblem {
  int64_t batch, queries, head_dim, value_dim;
  int64_t past, total;
  int64_t capacity;  // rows of a cache; 0 without one
  Tensor<const float> q, k, v, bias, sinks;
  Tensor<const uint8_t> key_cache, value_cache;  // of floats or rows, see Cache
  Tensor<const int64_t> key_mask;
  RotaryTable rotary;
};

// `cache` says whether there are formats to read.
AttentionSettings ReadAttentionSettings(const Attributes& attributes, Cache cache);

AttentionProblem ReadAttentionProblem(const Context& context, const AttentionSettings& settings);

}  // namespace qcompile::cpu

#endif  // QCOMPILE_CPU_OPS_ATTENTION_INPUTS_H_
