// Attention: rotary embedding, key/value cache, masks and softmax in one node.
#include <algorithm>
#include <cmath>
#include <limits>

#include "attention_keys.h"

namespace qcompile::cpu {
namespace {

// Keys that are attended to at a time where one query is all there is: a part of the work that
// does not depend on the number of threads, in steps of the kernel.
constexpr int64_t kPartKeys = 4 * kAttentionKeys;

class Attention : public Operator {
 public:
  Attention(const AttentionSettings& settings, const KernelTable& kernels)
      : s_(settings), kernels_(kernels) {}

  void Compute(const Context& context) const override {
    const AttentionProblem p = ReadAttentionProblem(context, s_);
    Shape shape = p.q.shape;
    shape.dims[2] = s_.heads * p.value_dim;
    float* out = context.Output(0, shape).data;
    const AttentionCall call = {context, kernels_, s_, p};
    const TokenRows keys = AllKeys(call), values = AllValues(call);
    if (p.batch * p.queries == 0) return;
    const float* mask = MaskAsFloats(p);
    if (p.queries == 1) {
      AttendInParts(context, p, keys, values, mask, out);
    } else {
      Attend(call, keys, values, mask, out);
    }
  }

 private:
  static const float* MaskAsFloats(const AttentionProblem& p) {
    if (!p.key_mask) return nullptr;
    const int64_t count = p.batch * p.total;
    const int64_t* mask = p.key_mask.data;
    if (std::find(mask, mask + count, 0) == mask + count) return nullptr;
    float* floats = ScratchFloats(ScratchSlot::kMask, count);
    std::transform(mask, mask + count, floats, [](int64_t m) { return m != 0 ? 1.0f : 0.0f; });
    return floats;
  }

  // Many queries: blocks of them, one head each.
  void Attend(const AttentionCall& call, const TokenRows& keys, const TokenRows& values,
              const float* mask, float* out) const {
    const AttentionProblem& p = call.problem;
    const int64_t rows = std::min(p.queries, kAttentionRows);
    const int64_t blocks = (p.queries + rows - 1) / rows;
    const PreparedKeys prepared = PrepareKeys(call, keys, values);
    call.context.ParallelFor(p.batch * s_.heads * blocks, Work(p), [&](int64_t task) {
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
  void AttendInParts(const Context& context, const AttentionProblem& p, const TokenRows& keys,
                     const TokenRows& values, const float* mask, float* out) const {
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
  int64_t Work(const AttentionProblem& p) const {
    return p.batch * s_.heads * p.queries * p.total * (p.head_dim + p.value_dim);
  }

  // What a row's bias is away from the next one's, where rows go along an axis.
  static int64_t BiasStride(const AttentionProblem& p, int axis) {
    const Shape& shape = p.bias.shape;
    if (!p.bias || shape[axis] == 1) return 0;
    return axis == 1 ? shape[2] * shape[3] : shape[3];
  }

  // Rows from a head and query on, with all keys; the caller says how many, and where to.
  AttentionTile Tile(const AttentionProblem& p, const TokenRows& keys, const TokenRows& values,
                     const float* mask, int64_t batch, int64_t head, int64_t query) const {
    const int64_t kv_head = head / (s_.heads / s_.kv_heads);
    AttentionTile tile = {};
    tile.q = StridedRows(p.q, p.head_dim).Floats(batch, head, query);
    tile.first_position = p.past + query;
    tile.head_dim = p.head_dim;
    tile.value_dim = p.value_dim;
    tile.keys = keys.Of(batch, kv_head);
    tile.values = values.Of(batch, kv_head);
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
  void Run(const AttentionProblem& p, int64_t batch, int64_t query, AttentionTile* tile) const {
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

  const AttentionSettings s_;
  const KernelTable& kernels_;
};

template <Cache kCache>
OperatorSpec Spec(const char* name) {
  const TensorSpec floats = {ort::kFloat, ort::kOptional};
  const TensorSpec caches = {kCache == Cache::kBytes ? ort::kUint8 : ort::kFloat, ort::kOptional};
  return {
      name,
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
      [](const Attributes& attributes, const KernelTable& kernels) -> std::unique_ptr<Operator> {
        return std::make_unique<Attention>(ReadAttentionSettings(attributes, kCache), kernels);
      }};
}

}  // namespace

OperatorSpec AttentionSpec() { return Spec<Cache::kFloats>("Attention"); }

// The same over caches of bytes.
OperatorSpec QAttentionSpec() { return Spec<Cache::kBytes>("QAttention"); }

}  // namespace qcompile::cpu
