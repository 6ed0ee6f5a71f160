// Keys and values of an attention node, brought to where the kernels read them.
#ifndef QCOMPILE_CPU_OPS_ATTENTION_KEYS_H_
#define QCOMPILE_CPU_OPS_ATTENTION_KEYS_H_

#include "attention_inputs.h"

namespace qcompile::cpu {

// One run of a node.
struct AttentionCall {
  const Context& context;
  const KernelTable& kernels;
  const AttentionSettings& settings;
  const AttentionProblem& problem;
};

// Where the keys (or values) of all tokens are; strides in bytes.
struct TokenRows {
  const uint8_t* data;
  int64_t batch_stride, head_stride, token_stride;
  CacheRow row;

  const uint8_t* Head(int64_t batch, int64_t head) const {
    return data + batch * batch_stride + head * head_stride;
  }
  const float* Floats(int64_t batch, int64_t head, int64_t token) const {
    return reinterpret_cast<const float*>(Head(batch, head) + token * token_stride);
  }
  CacheRows Of(int64_t batch, int64_t head) const { return {Head(batch, head), token_stride, row}; }
};

// A [batch, tokens, heads * dim] tensor as it is.
TokenRows StridedRows(const Tensor<const float>& t, int64_t dim);

// One head of one token, rotated, to `out`.
void Rotate(const RotaryTable& table, int64_t batch, int64_t token, const float* x, int64_t dim,
            float* out);

// All keys, rotated, and all values: behind the past in the caches, which are outputs 1 and 2, in
// place where input and output share memory. Without caches they are the call's own.
TokenRows AllKeys(const AttentionCall& call);
TokenRows AllValues(const AttentionCall& call);

// Keys as the kernel multiplies many queries by them, and values as floats: once for all blocks of
// queries and all heads that share them. What no query sees is left out.
struct PreparedKeys {
  const float* key_panels;  // [batch, kv_heads, padded total, head_dim]; null for few queries
  int64_t panel_stride;
  TokenRows values;
};

PreparedKeys PrepareKeys(const AttentionCall& call, const TokenRows& keys, const TokenRows& values);

}  // namespace qcompile::cpu

#endif  // QCOMPILE_CPU_OPS_ATTENTION_KEYS_H_
