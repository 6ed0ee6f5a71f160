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

// Keys that are attended to at a time where one query is all there is: a part of the work that
// does not depend on the number of threads, in steps of the kernel.
constexpr int64_t kPartKeys = 4 * kAttentionKeys;

struct Settings {
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

CacheFormat ReadFormat(const Attributes& attributes, const char* name) {
  const std::string format = attributes.String(name, "");
  if (format == "float") return CacheFormat::kFloat;
  if (format == "bf16") return CacheFormat::kBrain;
  if (format == "int8") return CacheFormat::kInt8;
  if (format == "int4") return CacheFormat::kInt4;
  Fail(name, " = '", format, "' is none of float, bf16, int8, int4");
}

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
  Tensor<const float> q, k, v, bias, sinks;
  Tensor<const uint8_t> key_cache, value_cache;  // of floats or rows, see Cache
  Tensor<const int64_t> key_mask;
  RotaryTable rotary;
};

int64_t HeadDim(const char* name, const Shape& shape, int64_t heads) {
  Require(shape.rank == 3 && shape[2] > 0 && shape[2] % heads == 0, name, " has shape ", shape,
          ", which is not [batch, tokens, ", heads, " * head size]");
  return shape[2] / heads;
}

// How caches are passed: as floats, or as rows of bytes.
enum class Cache { kFloats, kBytes };

Tensor<const uint8_t> ReadCache(const Context& context, Cache kind, size_t index) {
  if (kind == Cache::kBytes) return context.Input<uint8_t>(index);
  const Tensor<const float> floats = context.Input<float>(index);
  return {reinterpret_cast<const uint8_t*>(floats.data), floats.shape};
}

// The last axis of a cache.
int64_t CacheWidth(Cache kind, const CacheRow& row) {
  return kind == Cache::kBytes ? row.bytes() : row.width;
}

void ReadCaches(const Context& context, const Settings& s, Cache kind, Problem* p) {
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

Problem ReadProblem(const Context& context, const Settings& s, Cache kind) {
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
  ReadCaches(context, s, kind, &p);
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

// Where the keys (or values) of all tokens are; strides in bytes.
struct Source {
  const uint8_t* data;
  int64_t batch_stride, head_stride, token_stride;
  CacheRow row;

  const uint8_t* Head(int64_t batch, int64_t head) const {
    return data + batch * batch_stride + head * head_stride;
  }
  const float* Floats(int64_t batch, int64_t head, int64_t token) const {
    return reinterpret_cast<const float*>(Head(batch, head) + token * token_stride);
  }
};

CacheRow FloatRow(int64_t width) { return {CacheFormat::kFloat, width, width, 1}; }

class Attention : public Operator {
 public:
  Attention(const Settings& settings, Cache cache, const KernelTable& kernels)
      : s_(settings), cache_(cache), kernels_(kernels) {}

  void Compute(const Context& context) const override {
    const Problem p = ReadProblem(context, s_, cache_);
    Shape shape = p.q.shape;
    shape.dims[2] = s_.heads * p.value_dim;
    float* out = context.Output(0, shape).data;
    Source keys = Strided(p.k, p.head_dim), values = Strided(p.v, p.value_dim);
    if (p.capacity > 0) {
      keys = Append(context, p, 1, keys, p.key_cache, s_.KeyRow(p.head_dim), p.rotary);
      values = Append(context, p, 2, values, p.value_cache, s_.ValueRow(p.value_dim), {});
    } else if (p.rotary.half > 0) {
      keys = RotatedKeys(context, p);
    }
    if (p.batch * p.queries == 0) return;
    const float* mask = MaskAsFloats(p);
    if (p.queries == 1) {
      AttendInParts(context, p, keys, values, mask, out);
    } else {
      Attend(context, p, keys, values, mask, out);
    }
  }

 private:
  // A [batch, tokens, heads * dim] tensor as it is.
  static Source Strided(const Tensor<const float>& t, int64_t dim) {
    constexpr int64_t kBytes = sizeof(float);
    return {reinterpret_cast<const uint8_t*>(t.data), t.shape[1] * t.shape[2] * kBytes,
            dim * kBytes, t.shape[2] * kBytes, FloatRow(dim)};
  }

  // Writes the new tokens behind the past of a cache, in place where input and output share
  // memory; else the past is copied first. What lies beyond the last token is left alone.
  Source Append(const Context& context, const Problem& p, size_t output, const Source& fresh,
                const Tensor<const uint8_t>& cache, const CacheRow& row,
                const RotaryTable& rotary) const {
    uint8_t* grown = cache_ == Cache::kBytes
                         ? context.OutputBytes(output, cache.shape).data
                         : reinterpret_cast<uint8_t*>(context.Output(output, cache.shape).data);
    Require(grown != nullptr, "caches are given, but the output ", output == 1 ? "key" : "value",
            "_cache_out is not");
    const int64_t stride = row.bytes(), head_stride = p.capacity * stride;
    const bool in_place = grown == cache.data;
    const int64_t copied = in_place ? p.queries : p.total;
    const int64_t tasks = p.batch * s_.kv_heads;
    context.ParallelFor(tasks, tasks * copied * row.width * 4, [&](int64_t task) {
      const int64_t batch = task / s_.kv_heads, head = task % s_.kv_heads;
      uint8_t* to = grown + task * head_stride;
      if (!in_place) {
        const uint8_t* from = cache.data + task * head_stride;
        std::copy(from, from + p.past * stride, to);
      }
      to += p.past * stride;
      for (int64_t t = 0; t < p.queries; ++t, to += stride) {
        WriteRow(rotary, batch, t, fresh.Floats(batch, head, t), row, to);
      }
    });
    return {grown, s_.kv_heads * head_stride, head_stride, stride, row};
  }

  // One head of one token, rotated, as a cache keeps it.
  void WriteRow(const RotaryTable& rotary, int64_t batch, int64_t token, const float* x,
                const CacheRow& row, uint8_t* to) const {
    if (row.format == CacheFormat::kFloat) {
      return Rotate(rotary, batch, token, x, row.width, reinterpret_cast<float*>(to));
    }
    if (rotary.half > 0) {
      float* rotated = ScratchFloats(ScratchSlot::kWorker, row.width);
      Rotate(rotary, batch, token, x, row.width, rotated);
      x = rotated;
    }
    kernels_.encode_cache_row(row, x, to);
  }

  Source RotatedKeys(const Context& context, const Problem& p) const {
    const Source source = Strided(p.k, p.head_dim);
    const int64_t head_size = p.queries * p.head_dim, tasks = p.batch * s_.kv_heads;
    float* keys = ScratchFloats(ScratchSlot::kKeys, tasks * head_size);
    context.ParallelFor(tasks, tasks * head_size * 4, [&](int64_t task) {
      const int64_t batch = task / s_.kv_heads, head = task % s_.kv_heads;
      for (int64_t t = 0; t < p.queries; ++t) {
        Rotate(p.rotary, batch, t, source.Floats(batch, head, t), p.head_dim,
               keys + task * head_size + t * p.head_dim);
      }
    });
    constexpr int64_t kBytes = sizeof(float);
    return {reinterpret_cast<const uint8_t*>(keys), s_.kv_heads * head_size * kBytes,
            head_size * kBytes, p.head_dim * kBytes, FloatRow(p.head_dim)};
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

  // Keys as the kernel multiplies many queries by them, and values as floats: once for all blocks
  // of queries and all heads that share them. What no query sees is left out.
  struct Prepared {
    const float* key_panels = nullptr;  // [batch, kv_heads, padded total, head_dim]
    int64_t panel_stride = 0;
    Source values;
  };

  Prepared Prepare(const Context& context, const Problem& p, const Source& keys,
                   const Source& values) const {
    if (p.queries < kManyQueries) return {nullptr, 0, values};
    const int64_t steps = (p.total + kAttentionKeys - 1) / kAttentionKeys;
    const int64_t seen = s_.window > 0 ? std::max<int64_t>(p.past - s_.window + 1, 0) : 0;
    const int64_t first_step = seen / kAttentionKeys, heads = p.batch * s_.kv_heads;
    const int64_t panel_stride = steps * kAttentionKeys * p.head_dim;
    const bool decodes = values.row.format != CacheFormat::kFloat;
    float* panels = ScratchFloats(ScratchSlot::kKeyPanels, heads * panel_stride);
    const int64_t value_stride = p.total * p.value_dim;
    float* decoded = decodes ? ScratchFloats(ScratchSlot::kValues, heads * value_stride) : nullptr;
    const int64_t tasks = heads * (steps - first_step);
    context.ParallelFor(tasks, heads * panel_stride * 4, [&](int64_t task) {
      const int64_t head = task % heads, step = first_step + task / heads;
      const int64_t batch = head / s_.kv_heads, kv_head = head % s_.kv_heads;
      const int64_t first = step * kAttentionKeys;
      const int64_t count = std::min(kAttentionKeys, p.total - first);
      float* scratch = ScratchFloats(ScratchSlot::kWorker, kAttentionKeys * p.head_dim);
      const CacheRows from = {keys.Head(batch, kv_head), keys.token_stride, keys.row};
      kernels_.transpose_keys(from, first, count, scratch,
                              panels + head * panel_stride + first * p.head_dim);
      if (decodes) {
        const CacheRows rows = {values.Head(batch, kv_head), values.token_stride, values.row};
        kernels_.decode_cache_rows(rows, first, count,
                                   decoded + head * value_stride + first * p.value_dim);
      }
    });
    if (!decodes) return {panels, panel_stride, values};
    constexpr int64_t kBytes = sizeof(float);
    return {panels,
            panel_stride,
            {reinterpret_cast<const uint8_t*>(decoded), s_.kv_heads * value_stride * kBytes,
             value_stride * kBytes, p.value_dim * kBytes, FloatRow(p.value_dim)}};
  }

  // Many queries: blocks of them, one head each.
  void Attend(const Context& context, const Problem& p, const Source& keys, const Source& values,
              const float* mask, float* out) const {
    const int64_t rows = std::min(p.queries, kAttentionRows);
    const int64_t blocks = (p.queries + rows - 1) / rows;
    const Prepared prepared = Prepare(context, p, keys, values);
    context.ParallelFor(p.batch * s_.heads * blocks, Work(p), [&](int64_t task) {
      // The longest rows, those of the last queries, come first.
      const int64_t block = blocks - 1 - task / (p.batch * s_.heads);
      const int64_t batch = task / s_.heads % p.batch, head = task % s_.heads;
      const int64_t query = block * rows, count = std::min(rows, p.queries - query);
      AttentionTile tile = Tile(p, keys, prepared.values, mask, batch, head, query);
      if (prepared.key_panels != nullptr) {
        const int64_t kv_head = head / (s_.heads / s_.kv_heads);
        tile.key_panels =
            prepared.key_panels + (batch * s_.kv_heads + kv_head) * prepared.panel_stride;
      }
      tile.rows = count;
      tile.q_stride = s_.heads * p.head_dim;
      tile.out = out + (batch * p.queries + query) * s_.heads * p.value_dim + head * p.value_dim;
      tile.out_stride = s_.heads * p.value_dim;
      tile.bias_stride = BiasStride(p, 2);
      Run(p, batch, query, &tile);
    });
  }

  // One query: the heads that share keys go together, and the keys are taken in parts, so that few
  // heads make enough tasks.
  void AttendInParts(const Context& context, const Problem& p, const Source& keys,
                     const Source& values, const float* mask, float* out) const {
    const int64_t per_kv = s_.heads / s_.kv_heads, rows = std::min(per_kv, kAttentionRows);
    const int64_t blocks = (per_kv + rows - 1) / rows, groups = s_.kv_heads * blocks;
    const int64_t seen = s_.window > 0 ? std::max<int64_t>(p.total - s_.window, 0) : 0;
    const int64_t first_part = seen / kPartKeys;
    const int64_t parts = (p.total + kPartKeys - 1) / kPartKeys - first_part;
    const int64_t part_floats = AttentionPartFloats(p.value_dim);
    const int64_t rows_in_all = p.batch * s_.heads;
    float* found = parts == 1
                       ? nullptr
                       : ScratchFloats(ScratchSlot::kParts, parts * rows_in_all * part_floats);
    context.ParallelFor(p.batch * groups * parts, Work(p), [&](int64_t task) {
      const int64_t part = task / (p.batch * groups), batch = task / groups % p.batch;
      const int64_t kv_head = task % groups / blocks, first = task % blocks * rows;
      const int64_t head = kv_head * per_kv + first;
      AttentionTile tile = Tile(p, keys, values, mask, batch, head, 0);
      tile.rows = std::min(rows, per_kv - first);
      tile.rows_are_heads = true;
      tile.q_stride = p.head_dim;
      const int64_t row = batch * s_.heads + head;
      tile.out = out + row * p.value_dim;
      tile.out_stride = p.value_dim;
      tile.bias_stride = BiasStride(p, 1);
      tile.sinks_stride = 1;
      if (found != nullptr) {
        tile.key_begin = (first_part + part) * kPartKeys;
        tile.key_end = std::min(tile.key_begin + kPartKeys, p.total);
        if (part > 0) tile.sinks = nullptr;
        tile.part = found + (part * rows_in_all + row) * part_floats;
      }
      Run(p, batch, 0, &tile);
    });
    for (int64_t row = 0; found != nullptr && row < rows_in_all; ++row) {
      JoinParts(found + row * part_floats, parts, rows_in_all * part_floats, p.value_dim,
                out + row * p.value_dim);
    }
  }

  // One row of the output from the parts of its keys.
  static void JoinParts(const float* part, int64_t parts, int64_t stride, int64_t value_dim,
                        float* out) {
    const int64_t weight_at = PadTo16(value_dim), largest_at = weight_at + 1;
    float largest = -std::numeric_limits<float>::infinity();
    for (int64_t i = 0; i < parts; ++i) {
      const float found = part[i * stride + largest_at];
      largest = largest > found ? largest : found;  // NaN wins
    }
    if (largest == -std::numeric_limits<float>::infinity()) largest = 0.0f;
    float weight = 0.0f;
    std::fill(out, out + value_dim, 0.0f);
    for (int64_t i = 0; i < parts; ++i) {
      const float* sums = part + i * stride;
      const float factor = std::exp(sums[largest_at] - largest);
      weight += factor * sums[weight_at];
      for (int64_t d = 0; d < value_dim; ++d) out[d] += factor * sums[d];
    }
    const float factor = weight == 0.0f ? 0.0f : 1.0f / weight;
    for (int64_t d = 0; d < value_dim; ++d) out[d] *= factor;
  }

  // Multiplications of the whole node.
  int64_t Work(const Problem& p) const {
    return p.batch * s_.heads * p.queries * p.total * (p.head_dim + p.value_dim);
  }

  // What a row's bias is away from the next one's, where rows go along an axis.
  static int64_t BiasStride(const Problem& p, int axis) {
    const Shape& shape = p.bias.shape;
    if (!p.bias || shape[axis] == 1) return 0;
    return axis == 1 ? shape[2] * shape[3] : shape[3];
  }

  // Rows from a head and query on, with all keys; the caller says how many, and where to.
  AttentionTile Tile(const Problem& p, const Source& keys, const Source& values, const float* mask,
                     int64_t batch, int64_t head, int64_t query) const {
    const int64_t kv_head = head / (s_.heads / s_.kv_heads);
    AttentionTile tile = {};
    tile.q = Strided(p.q, p.head_dim).Floats(batch, head, query);
    tile.first_position = p.past + query;
    tile.head_dim = p.head_dim;
    tile.value_dim = p.value_dim;
    tile.keys = {keys.Head(batch, kv_head), keys.token_stride, keys.row};
    tile.values = {values.Head(batch, kv_head), values.token_stride, values.row};
    tile.total = p.total;
    tile.key_end = p.total;
    tile.mask = mask != nullptr ? mask + batch * p.total : nullptr;
    if (p.bias) {
      const Shape& shape = p.bias.shape;
      const int64_t at[3] = {shape[0] == 1 ? 0 : batch, shape[1] == 1 ? 0 : head,
                             shape[2] == 1 ? 0 : query};
      tile.bias = p.bias.data + ((at[0] * shape[1] + at[1]) * shape[2] + at[2]) * shape[3];
    }
    tile.sinks = p.sinks ? p.sinks.data + head : nullptr;
    tile.scale = std::isnan(s_.scale) ? 1.0f / std::sqrt(static_cast<float>(p.head_dim)) : s_.scale;
    tile.softcap = s_.softcap;
    tile.causal = s_.causal;
    tile.window = s_.window;
    return tile;
  }

  // Rotates the tile's queries, gives it memory, and computes it.
  void Run(const Problem& p, int64_t batch, int64_t query, AttentionTile* tile) const {
    const int64_t tile_floats = AttentionScratchFloats(p.head_dim, p.value_dim);
    tile->scratch = ScratchFloats(ScratchSlot::kWorker, tile_floats + kAttentionRows * p.head_dim);
    if (p.rotary.half > 0) {
      float* rotated = tile->scratch + tile_floats;
      for (int64_t r = 0; r < tile->rows; ++r) {
        Rotate(p.rotary, batch, tile->rows_are_heads ? query : query + r,
               tile->q + r * tile->q_stride, p.head_dim, rotated + r * p.head_dim);
      }
      tile->q = rotated;
      tile->q_stride = p.head_dim;
    }
    kernels_.attention(*tile);
  }

  const Settings s_;
  const Cache cache_;
  const KernelTable& kernels_;
};

OperatorSpec Spec(const char* name, ort::ElementType cache,
                  std::unique_ptr<Operator> (*make)(const Attributes&, const KernelTable&)) {
  const TensorSpec floats = {ort::kFloat, ort::kOptional};
  const TensorSpec caches = {cache, ort::kOptional};
  return {name,
          {{ort::kFloat},
           {ort::kFloat},
           {ort::kFloat},
           caches,                         // key_cache
           caches,                         // value_cache
           {ort::kInt64, ort::kOptional},  // key_mask
           floats,                         // bias
           floats,                         // cos
           floats,                         // sin
           floats},                        // sinks
          {{ort::kFloat}, caches, caches},
          make};
}

}  // namespace

OperatorSpec AttentionSpec() {
  return Spec(
      "Attention", ort::kFloat,
      [](const Attributes& attributes, const KernelTable& kernels) -> std::unique_ptr<Operator> {
        return std::make_unique<Attention>(ReadSettings(attributes), Cache::kFloats, kernels);
      });
}

// The same over caches of bytes.
OperatorSpec QAttentionSpec() {
  return Spec(
      "QAttention", ort::kUint8,
      [](const Attributes& attributes, const KernelTable& kernels) -> std::unique_ptr<Operator> {
        Settings settings = ReadSettings(attributes);
        settings.key_format = ReadFormat(attributes, "key_format");
        settings.value_format = ReadFormat(attributes, "value_format");
        settings.key_group_size = attributes.Int("key_group_size", 0);
        settings.value_group_size = attributes.Int("value_group_size", 0);
        Require(settings.key_group_size >= 0 && settings.value_group_size >= 0,
                "a group size is negative");
        return std::make_unique<Attention>(settings, Cache::kBytes, kernels);
      });
}

}  // namespace qcompile::cpu
