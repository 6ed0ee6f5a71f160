#include "attention_keys.h"

#include <algorithm>

namespace qcompile::cpu {
namespace {

CacheRow FloatRow(int64_t width) { return {CacheFormat::kFloat, width, width, 1}; }

// Floats of every head, one head after the other.
TokenRows Contiguous(const float* data, int64_t heads, int64_t tokens, int64_t width) {
  const int64_t token = width * int64_t{sizeof(float)}, head = tokens * token;
  return {reinterpret_cast<const uint8_t*>(data), heads * head, head, token, FloatRow(width)};
}

// One head of one token, rotated, as a cache keeps it.
void WriteRow(const KernelTable& kernels, const RotaryTable& rotary, int64_t batch, int64_t token,
              const float* x, const CacheRow& row, uint8_t* to) {
  if (row.format == CacheFormat::kFloat) {
    return Rotate(rotary, batch, token, x, row.width, reinterpret_cast<float*>(to));
  }
  if (rotary.half > 0) {
    float* rotated = ScratchFloats(ScratchSlot::kWorker, row.width);
    Rotate(rotary, batch, token, x, row.width, rotated);
    x = rotated;
  }
  kernels.encode_cache_row(row, x, to);
}

// A cache and what becomes of it.
struct Growing {
  const Tensor<const uint8_t>& cache;
  CacheRow row;
  size_t output;
  const char* name;
  RotaryTable rotary;
};

// Writes the new tokens behind the past of a cache; unless that is done in place, the past is
// copied first. What lies beyond the last token is left alone.
TokenRows Append(const AttentionCall& call, const TokenRows& fresh, const Growing& g) {
  const AttentionProblem& p = call.problem;
  const int64_t heads = call.settings.kv_heads;
  uint8_t* grown =
      call.settings.cache == Cache::kBytes
          ? call.context.OutputBytes(g.output, g.cache.shape).data
          : reinterpret_cast<uint8_t*>(call.context.Output(g.output, g.cache.shape).data);
  Require(grown != nullptr, "caches are given, but the output ", g.name, " is not");
  const int64_t stride = g.row.bytes(), head_stride = p.capacity * stride;
  const bool in_place = grown == g.cache.data;
  const int64_t copied = in_place ? p.queries : p.total;
  const int64_t tasks = p.batch * heads;
  call.context.ParallelFor(tasks, tasks * copied * g.row.width * 4, [&](int64_t task) {
    const int64_t batch = task / heads, head = task % heads;
    uint8_t* to = grown + task * head_stride;
    if (!in_place) {
      const uint8_t* from = g.cache.data + task * head_stride;
      std::copy(from, from + p.past * stride, to);
    }
    to += p.past * stride;
    for (int64_t t = 0; t < p.queries; ++t, to += stride) {
      WriteRow(call.kernels, g.rotary, batch, t, fresh.Floats(batch, head, t), g.row, to);
    }
  });
  return {grown, heads * head_stride, head_stride, stride, g.row};
}

TokenRows RotatedKeys(const AttentionCall& call, const TokenRows& fresh) {
  const AttentionProblem& p = call.problem;
  const int64_t heads = call.settings.kv_heads, head_size = p.queries * p.head_dim;
  const int64_t tasks = p.batch * heads;
  float* keys = ScratchFloats(ScratchSlot::kKeys, tasks * head_size);
  call.context.ParallelFor(tasks, tasks * head_size * 4, [&](int64_t task) {
    const int64_t batch = task / heads, head = task % heads;
    for (int64_t t = 0; t < p.queries; ++t) {
      Rotate(p.rotary, batch, t, fresh.Floats(batch, head, t), p.head_dim,
             keys + task * head_size + t * p.head_dim);
    }
  });
  return Contiguous(keys, heads, p.queries, p.head_dim);
}

}  // namespace

TokenRows StridedRows(const Tensor<const float>& t, int64_t dim) {
  constexpr int64_t kBytes = sizeof(float);
  return {reinterpret_cast<const uint8_t*>(t.data), t.shape[1] * t.shape[2] * kBytes, dim * kBytes,
          t.shape[2] * kBytes, FloatRow(dim)};
}

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

TokenRows AllKeys(const AttentionCall& call) {
  const AttentionProblem& p = call.problem;
  const TokenRows fresh = StridedRows(p.k, p.head_dim);
  if (p.capacity > 0) {
    const CacheRow row = call.settings.KeyRow(p.head_dim);
    return Append(call, fresh, {p.key_cache, row, 1, "key_cache_out", p.rotary});
  }
  return p.rotary.half > 0 ? RotatedKeys(call, fresh) : fresh;
}

TokenRows AllValues(const AttentionCall& call) {
  const AttentionProblem& p = call.problem;
  const TokenRows fresh = StridedRows(p.v, p.value_dim);
  if (p.capacity == 0) return fresh;
  const CacheRow row = call.settings.ValueRow(p.value_dim);
  return Append(call, fresh, {p.value_cache, row, 2, "value_cache_out", {}});
}

PreparedKeys PrepareKeys(const AttentionCall& call, const TokenRows& keys,
                         const TokenRows& values) {
  const AttentionProblem& p = call.problem;
  if (p.queries < kManyQueries) return {nullptr, 0, values};
  const int64_t kv_heads = call.settings.kv_heads, heads = p.batch * kv_heads;
  const int64_t window = call.settings.window;
  const int64_t unseen = window > 0 ? std::max<int64_t>(p.past - window + 1, 0) : 0;
  const int64_t first_step = unseen / kAttentionKeys;
  const int64_t steps = (p.total + kAttentionKeys - 1) / kAttentionKeys;
  const int64_t panel_stride = steps * kAttentionKeys * p.head_dim;
  float* panels = ScratchFloats(ScratchSlot::kKeyPanels, heads * panel_stride);
  const bool decodes = values.row.format != CacheFormat::kFloat;
  const int64_t value_stride = p.total * p.value_dim;
  float* decoded = decodes ? ScratchFloats(ScratchSlot::kValues, heads * value_stride) : nullptr;
  const int64_t tasks = heads * (steps - first_step);
  call.context.ParallelFor(tasks, heads * panel_stride * 4, [&](int64_t task) {
    const int64_t head = task % heads, first = (first_step + task / heads) * kAttentionKeys;
    const int64_t batch = head / kv_heads, kv_head = head % kv_heads;
    const int64_t count = std::min(kAttentionKeys, p.total - first);
    float* scratch = ScratchFloats(ScratchSlot::kWorker, kAttentionKeys * p.head_dim);
    call.kernels.transpose_keys(keys.Of(batch, kv_head), first, count, scratch,
                                panels + head * panel_stride + first * p.head_dim);
    if (decodes) {
      call.kernels.decode_cache_rows(values.Of(batch, kv_head), first, count,
                                     decoded + head * value_stride + first * p.value_dim);
    }
  });
  if (!decodes) return {panels, panel_stride, values};
  return {panels, panel_stride, Contiguous(decoded, kv_heads, p.total, p.value_dim)};
}

}  // namespace qcompile::cpu
