// Attention: rotary embedding, key/value cache, masks and softmax in one node.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "operator.h"

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

struct Settings {
  int64_t heads, kv_heads;
  float scale;  // NaN: 1 / sqrt(head_dim)
  bool causal;
  int64_t window;
  float softcap;
  int64_t rotary_dim;
  bool interleaved;
};

Settings ReadSettings(const Attributes& attributes) {
  Settings s;
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
  return s;
}

// A rotary table: row (batch, token) has `half` angles.
struct RotaryTable {
  const float* cos = nullptr;
  const float* sin = nullptr;
  int64_t batch_stride = 0;
  int64_t half = 0;
  bool interleaved = false;
};

// The checked inputs of one call.
struct Problem {
  int64_t batch, queries, head_dim, value_dim;
  int64_t past, total;
  int64_t capacity;  // rows of a cache; 0 without one
  Tensor<const float> q, k, v, key_cache, value_cache, bias, sinks;
  Tensor<const int64_t> key_mask;
  RotaryTable rotary;
};

int64_t HeadDim(const char* name, const Shape& shape, int64_t heads) {
  Require(shape.rank == 3 && shape[2] > 0 && shape[2] % heads == 0, name, " has shape ", shape,
          ", which is not [batch, tokens, ", heads, " * head size]");
  return shape[2] / heads;
}

void ReadCaches(const Context& context, const Settings& s, Problem* p) {
  p->key_cache = context.Input<float>(kKeyCache);
  p->value_cache = context.Input<float>(kValueCache);
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
    Require(p->past == 0, "key_mask covers ", p->total, " keys, but there are ", p->queries,
            " and no cache");
    return;
  }
  Require(bool{p->key_mask}, "caches need a key_mask, whose length tells how full they are");
  const Shape &keys = p->key_cache.shape, &values = p->value_cache.shape;
  Require(keys.rank == 4 && keys[0] == p->batch && keys[1] == s.kv_heads && keys[3] == p->head_dim,
          "key_cache has shape ", keys, " instead of [", p->batch, ", ", s.kv_heads, ", capacity, ",
          p->head_dim, "]");
  Require(values.rank == 4 && values[0] == p->batch && values[1] == s.kv_heads &&
              values[2] == keys[2] && values[3] == p->value_dim,
          "value_cache has shape ", values, " instead of [", p->batch, ", ", s.kv_heads, ", ",
          keys[2], ", ", p->value_dim, "]");
  p->capacity = keys[2];
  Require(p->total <= p->capacity, p->past, " cached and ", p->queries,
          " new tokens do not fit the cache's capacity of ", p->capacity);
}

void ReadRotary(const Context& context, const Settings& s, Problem* p) {
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

Problem ReadProblem(const Context& context, const Settings& s) {
  Problem p = {};
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

// One head of one token, rotated, to `out`.
void Rotate(const RotaryTable& table, int64_t batch, int64_t token, const float* x, int64_t dim,
            float* out) {
  const int64_t half = table.half;
  const float* cos = table.cos + batch * table.batch_stride + token * half;
  const float* sin = table.sin + batch * table.batch_stride + token * half;
  if (table.interleaved) {
    for (int64_t j = 0; j < half; ++j) {
      const float a = x[2 * j], b = x[2 * j + 1];
      out[2 * j] = a * cos[j] - b * sin[j];
      out[2 * j + 1] = b * cos[j] + a * sin[j];
    }
  } else {
    for (int64_t j = 0; j < half; ++j) {
      const float a = x[j], b = x[j + half];
      out[j] = a * cos[j] - b * sin[j];
      out[j + half] = b * cos[j] + a * sin[j];
    }
  }
  std::copy(x + 2 * half, x + dim, out + 2 * half);
}

// Where the keys (or values) of all tokens are.
struct Source {
  const float* data;
  int64_t batch_stride, head_stride, token_stride;

  const float* Head(int64_t batch, int64_t head) const {
    return data + batch * batch_stride + head * head_stride;
  }
};

class Attention : public Operator {
 public:
  Attention(const Attributes& attributes, const KernelTable& kernels)
      : s_(ReadSettings(attributes)), kernels_(kernels) {}

  void Compute(const Context& context) const override {
    const Problem p = ReadProblem(context, s_);
    Shape shape = p.q.shape;
    shape.dims[2] = s_.heads * p.value_dim;
    float* out = context.Output(0, shape).data;
    Source keys = Strided(p.k, p.head_dim), values = Strided(p.v, p.value_dim);
    if (p.capacity > 0) {
      keys = Append(context, p, 1, p.k, p.key_cache, p.head_dim, p.rotary);
      values = Append(context, p, 2, p.v, p.value_cache, p.value_dim, RotaryTable{});
    } else if (p.rotary.half > 0) {
      keys = RotatedKeys(context, p);
    }
    if (p.batch * p.queries == 0) return;
    Attend(context, p, keys, values, MaskAsFloats(p), out);
  }

 private:
  // A [batch, tokens, heads * dim] tensor as it is.
  static Source Strided(const Tensor<const float>& t, int64_t dim) {
    return {t.data, t.shape[1] * t.shape[2], dim, t.shape[2]};
  }

  // Writes the new tokens behind the past of a cache, in place where input and output share
  // memory; else the past is copied first. What lies beyond the last token is left alone.
  Source Append(const Context& context, const Problem& p, size_t output,
                const Tensor<const float>& fresh, const Tensor<const float>& cache, int64_t dim,
                const RotaryTable& rotary) const {
    const Tensor<float> grown = context.Output(output, cache.shape);
    Require(bool{grown}, "caches are given, but the output ", output == 1 ? "key" : "value",
            "_cache_out is not");
    const Source source = Strided(fresh, dim);
    const int64_t head_stride = p.capacity * dim;
    const bool in_place = grown.data == cache.data;
    const int64_t copied = in_place ? p.queries : p.total;
    const int64_t tasks = p.batch * s_.kv_heads;
    context.ParallelFor(tasks, tasks * copied * dim * 4, [&](int64_t task) {
      const int64_t batch = task / s_.kv_heads, head = task % s_.kv_heads;
      float* to = grown.data + task * head_stride;
      if (!in_place) {
        const float* from = cache.data + task * head_stride;
        std::copy(from, from + p.past * dim, to);
      }
      to += p.past * dim;
      const float* from = source.Head(batch, head);
      for (int64_t t = 0; t < p.queries; ++t) {
        Rotate(rotary, batch, t, from + t * source.token_stride, dim, to + t * dim);
      }
    });
    return {grown.data, s_.kv_heads * head_stride, head_stride, dim};
  }

  Source RotatedKeys(const Context& context, const Problem& p) const {
    const Source source = Strided(p.k, p.head_dim);
    const int64_t head_stride = p.queries * p.head_dim, tasks = p.batch * s_.kv_heads;
    float* keys = ScratchFloats(ScratchSlot::kKeys, tasks * head_stride);
    context.ParallelFor(tasks, tasks * head_stride * 4, [&](int64_t task) {
      const int64_t batch = task / s_.kv_heads, head = task % s_.kv_heads;
      const float* from = source.Head(batch, head);
      for (int64_t t = 0; t < p.queries; ++t) {
        Rotate(p.rotary, batch, t, from + t * source.token_stride, p.head_dim,
               keys + task * head_stride + t * p.head_dim);
      }
    });
    return {keys, s_.kv_heads * head_stride, head_stride, p.head_dim};
  }

  static const float* MaskAsFloats(const Problem& p) {
    if (!p.key_mask) return nullptr;
    const int64_t count = p.batch * p.total;
    const int64_t* mask = p.key_mask.data;
    if (std::find(mask, mask + count, 0) == mask + count) return nullptr;
    float* floats = ScratchFloats(ScratchSlot::kMask, count);
    std::transform(mask, mask + count, floats, [](int64_t m) { return m != 0 ? 1.0f : 0.0f; });
    return floats;
  }

  void Attend(const Context& context, const Problem& p, const Source& keys, const Source& values,
              const float* mask, float* out) const {
    // One query: the heads that share keys go together, unless that leaves too few tasks.
    constexpr int64_t kEnoughTasks = 8;
    const int64_t per_kv = s_.heads / s_.kv_heads;
    const bool rows_are_heads = p.queries == 1;
    const int64_t row_count = rows_are_heads ? per_kv : p.queries;
    int64_t rows = std::min(row_count, kAttentionRows);
    if (rows_are_heads && p.batch * s_.kv_heads < kEnoughTasks) rows = 1;
    const int64_t blocks = (row_count + rows - 1) / rows;
    const int64_t lanes = rows_are_heads ? s_.kv_heads : s_.heads;
    const int64_t work = p.batch * s_.heads * p.queries * p.total * (p.head_dim + p.value_dim);
    context.ParallelFor(p.batch * lanes * blocks, work, [&](int64_t task) {
      // The longest rows, those of the last queries, come first.
      const int64_t block = blocks - 1 - task / (p.batch * lanes);
      const int64_t batch = task / lanes % p.batch, lane = task % lanes;
      const int64_t first = block * rows, count = std::min(rows, row_count - first);
      const int64_t head = rows_are_heads ? lane * per_kv + first : lane;
      const int64_t query = rows_are_heads ? 0 : first;
      AttendRows(p, keys, values, mask, out, batch, head, query, count, rows_are_heads);
    });
  }

  void AttendRows(const Problem& p, const Source& keys, const Source& values, const float* mask,
                  float* out, int64_t batch, int64_t head, int64_t query, int64_t count,
                  bool rows_are_heads) const {
    const int64_t kv_head = head / (s_.heads / s_.kv_heads);
    const int64_t tile_floats = AttentionScratchFloats(p.head_dim, p.value_dim);
    float* scratch = ScratchFloats(ScratchSlot::kWorker, tile_floats + kAttentionRows * p.head_dim);
    AttentionTile tile = {};
    tile.scratch = scratch;

    const Source q = Strided(p.q, p.head_dim);
    const float* from = q.Head(batch, head) + query * q.token_stride;
    const int64_t step = rows_are_heads ? q.head_stride : q.token_stride;
    tile.q = from;
    tile.q_stride = step;
    if (p.rotary.half > 0) {
      float* rotated = scratch + tile_floats;
      for (int64_t r = 0; r < count; ++r) {
        Rotate(p.rotary, batch, rows_are_heads ? query : query + r, from + r * step, p.head_dim,
               rotated + r * p.head_dim);
      }
      tile.q = rotated;
      tile.q_stride = p.head_dim;
    }

    const int64_t out_token = s_.heads * p.value_dim;
    tile.out = out + (batch * p.queries + query) * out_token + head * p.value_dim;
    tile.out_stride = rows_are_heads ? p.value_dim : out_token;
    tile.rows = count;
    tile.rows_are_heads = rows_are_heads;
    tile.first_position = p.past + query;
    tile.head_dim = p.head_dim;
    tile.value_dim = p.value_dim;
    tile.keys = keys.Head(batch, kv_head);
    tile.key_stride = keys.token_stride;
    tile.values = values.Head(batch, kv_head);
    tile.value_stride = values.token_stride;
    tile.total = p.total;
    tile.mask = mask != nullptr ? mask + batch * p.total : nullptr;
    if (p.bias) {
      const Shape& shape = p.bias.shape;
      const int64_t at[3] = {shape[0] == 1 ? 0 : batch, shape[1] == 1 ? 0 : head,
                             shape[2] == 1 ? 0 : query};
      tile.bias = p.bias.data + ((at[0] * shape[1] + at[1]) * shape[2] + at[2]) * shape[3];
      const int axis = rows_are_heads ? 1 : 2;
      const int64_t along = rows_are_heads ? shape[2] * shape[3] : shape[3];
      tile.bias_stride = shape[axis] == 1 ? 0 : along;
    }
    tile.sinks = p.sinks ? p.sinks.data + head : nullptr;
    tile.sinks_stride = rows_are_heads ? 1 : 0;
    tile.scale = std::isnan(s_.scale) ? 1.0f / std::sqrt(static_cast<float>(p.head_dim)) : s_.scale;
    tile.softcap = s_.softcap;
    tile.causal = s_.causal;
    tile.window = s_.window;
    kernels_.attention(tile);
  }

  const Settings s_;
  const KernelTable& kernels_;
};

}  // namespace

OperatorSpec AttentionSpec() {
  const TensorSpec floats = {ort::kFloat, ort::kOptional};
  return {
      "Attention",
      {{ort::kFloat},
       {ort::kFloat},
       {ort::kFloat},
       floats,                         // key_cache
       floats,                         // value_cache
       {ort::kInt64, ort::kOptional},  // key_mask
       floats,                         // bias
       floats,                         // cos
       floats,                         // sin
       floats},                        // sinks
      {{ort::kFloat}, floats, floats},
      [](const Attributes& attributes, const KernelTable& kernels) -> std::unique_ptr<Operator> {
        return std::make_unique<Attention>(attributes, kernels);
      }};
}

}  // namespace qcompile::cpu
