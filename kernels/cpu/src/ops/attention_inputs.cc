#include "attention_inputs.h"

#include <limits>

namespace qcompile::cpu {
namespace {

enum Input : size_t {
  kQuery,
  kKey,
  kValue,
  kKeyCache,
  kValueCache,
  kKeyMask,
  kBias,
  kCos,
  kSin,
  kSinks
};

CacheFormat ReadFormat(const Attributes& attributes, const char* name) {
  const std::string format = attributes.String(name, "");
  if (format == "float") return CacheFormat::kFloat;
  if (format == "bf16") return CacheFormat::kBrain;
  if (format == "int8") return CacheFormat::kInt8;
  if (format == "int4") return CacheFormat::kInt4;
  Fail(name, " = '", format, "' is none of float, bf16, int8, int4");
}

int64_t HeadDim(const char* name, const Shape& shape, int64_t heads) {
  Require(shape.rank == 3 && shape[2] > 0 && shape[2] % heads == 0, name, " has shape ", shape,
          ", which is not [batch, tokens, ", heads, " * head size]");
  return shape[2] / heads;
}

Tensor<const uint8_t> ReadCache(const Context& context, Cache kind, size_t index) {
  if (kind == Cache::kBytes) return context.Input<uint8_t>(index);
  const Tensor<const float> floats = context.Input<float>(index);
  return {reinterpret_cast<const uint8_t*>(floats.data), floats.shape};
}

// The last axis of a cache.
int64_t CacheWidth(Cache kind, const CacheRow& row) {
  return kind == Cache::kBytes ? row.bytes() : row.width;
}

void ReadCaches(const Context& context, const AttentionSettings& s, AttentionProblem* p) {
  const Cache kind = s.cache;
  p->key_cache = ReadCache(context, kind, kKeyCache);
  p->value_cache = ReadCache(context, kind, kValueCache);
  p->key_mask = context.Input<int64_t>(kKeyMask);
  Require(bool{p->key_cache} == bool{p->value_cache},
          "key_cache and value_cache must be given together");
  const Shape& mask = p->key_mask.shape;
  Require(!p->key_mask || (mask.rank == 2 && mask[0] == p->batch && mask[1] >= p->queries),
          "key_mask has shape ", mask, " instead of [", p->batch, ", past + ", p->queries, "]");
  p->total = p->key_mask ? mask[1] : p->queries;
  p->past = p->total - p->queries;
  p->capacity = 0;
  if (!p->key_cache) {
    Require(kind == Cache::kFloats, "there is no cache");
    Require(p->past == 0, "key_mask covers ", p->total, " keys, but there are ", p->queries,
            " and no cache");
    return;
  }
  Require(bool{p->key_mask}, "caches need a key_mask, whose length tells how full they are");
  const Shape &keys = p->key_cache.shape, &values = p->value_cache.shape;
  const int64_t key_width = CacheWidth(kind, s.KeyRow(p->head_dim));
  const int64_t value_width = CacheWidth(kind, s.ValueRow(p->value_dim));
  Require(keys.rank == 4 && keys[0] == p->batch && keys[1] == s.kv_heads && keys[3] == key_width,
          "key_cache has shape ", keys, " instead of [", p->batch, ", ", s.kv_heads, ", capacity, ",
          key_width, "]");
  Require(values.rank == 4 && values[0] == p->batch && values[1] == s.kv_heads &&
              values[2] == keys[2] && values[3] == value_width,
          "value_cache has shape ", values, " instead of [", p->batch, ", ", s.kv_heads, ", ",
          keys[2], ", ", value_width, "]");
  p->capacity = keys[2];
  Require(p->total <= p->capacity, p->past, " cached and ", p->queries,
          " new tokens do not fit the cache's capacity of ", p->capacity);
}

void ReadRotary(const Context& context, const AttentionSettings& s, AttentionProblem* p) {
  const auto cos = context.Input<float>(kCos);
  const auto sin = context.Input<float>(kSin);
  if (s.rotary_dim == 0) {
    Require(!cos && !sin, "cos and sin are given, but rotary_dim is 0");
    return;
  }
  Require(s.rotary_dim <= p->head_dim, "rotary_dim = ", s.rotary_dim, " exceeds the head size ",
          p->head_dim);
  const int64_t half = s.rotary_dim / 2;
  for (const auto* table : {&cos, &sin}) {
    Require(bool{*table}, "rotary_dim = ", s.rotary_dim, " needs both cos and sin");
    const Shape& shape = table->shape;
    Require(shape.rank == 3 && (shape[0] == 1 || shape[0] == p->batch) && shape[1] == p->queries &&
                shape[2] == half,
            "cos or sin has shape ", shape, " instead of [1 or ", p->batch, ", ", p->queries, ", ",
            half, "]");
  }
  Require(cos.shape == sin.shape, "cos has shape ", cos.shape, ", but sin has ", sin.shape);
  const int64_t batch_stride = cos.shape[0] == 1 ? 0 : p->queries * half;
  p->rotary = {cos.data, sin.data, batch_stride, half, s.interleaved};
}

}  // namespace

AttentionSettings ReadAttentionSettings(const Attributes& attributes, Cache cache) {
  AttentionSettings s;
  s.cache = cache;
  s.heads = attributes.Int("num_heads");
  s.kv_heads = attributes.Int("num_kv_heads");
  Require(s.heads > 0 && s.kv_heads > 0 && s.heads % s.kv_heads == 0, "num_heads = ", s.heads,
          " is no multiple of num_kv_heads = ", s.kv_heads);
  s.scale = attributes.Float("scale", std::numeric_limits<float>::quiet_NaN());
  s.causal = attributes.Int("causal", 0) != 0;
  s.window = attributes.Int("window", 0);
  Require(s.window >= 0, "window = ", s.window, " is negative");
  s.softcap = attributes.Float("softcap", 0.0f);
  Require(s.softcap >= 0.0f, "softcap is negative");
  s.rotary_dim = attributes.Int("rotary_dim", 0);
  Require(s.rotary_dim >= 0 && s.rotary_dim % 2 == 0, "rotary_dim = ", s.rotary_dim,
          " is no even number");
  s.interleaved = attributes.Int("interleaved", 0) != 0;
  if (cache == Cache::kFloats) return s;
  s.key_format = ReadFormat(attributes, "key_format");
  s.value_format = ReadFormat(attributes, "value_format");
  s.key_group_size = attributes.Int("key_group_size", 0);
  s.value_group_size = attributes.Int("value_group_size", 0);
  Require(s.key_group_size >= 0 && s.value_group_size >= 0, "a group size is negative");
  return s;
}

AttentionProblem ReadAttentionProblem(const Context& context, const AttentionSettings& s) {
  AttentionProblem p = {};
  p.q = context.Input<float>(kQuery);
  p.k = context.Input<float>(kKey);
  p.v = context.Input<float>(kValue);
  p.head_dim = HeadDim("q", p.q.shape, s.heads);
  p.value_dim = HeadDim("v", p.v.shape, s.kv_heads);
  Require(HeadDim("k", p.k.shape, s.kv_heads) == p.head_dim, "k has shape ", p.k.shape,
          ", but q has heads of ", p.head_dim);
  p.batch = p.q.shape[0];
  p.queries = p.q.shape[1];
  for (const auto* t : {&p.k, &p.v}) {
    Require(t->shape[0] == p.batch && t->shape[1] == p.queries, "k or v has shape ", t->shape,
            ", but q has ", p.q.shape);
  }
  ReadCaches(context, s, &p);
  ReadRotary(context, s, &p);
  p.bias = context.Input<float>(kBias);
  const Shape& bias = p.bias.shape;
  const auto fits = [&](int axis, int64_t size) { return bias[axis] == 1 || bias[axis] == size; };
  Require(!p.bias || (bias.rank == 4 && fits(0, p.batch) && fits(1, s.heads) &&
                      fits(2, p.queries) && bias[3] == p.total),
          "bias has shape ", bias, " instead of [1 or ", p.batch, ", 1 or ", s.heads, ", 1 or ",
          p.queries, ", ", p.total, "]");
  p.sinks = context.Input<float>(kSinks);
  Require(!p.sinks || (p.sinks.shape.rank == 1 && p.sinks.shape[0] == s.heads), "sinks have shape ",
          p.sinks.shape, " instead of [", s.heads, "]");
  return p;
}

}  // namespace qcompile::cpu
