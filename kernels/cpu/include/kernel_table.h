// The seam between operators and instruction sets: one table of functions per instruction set.
//
// Operators validate, split the work and call through a table; a table's functions are plain
// single-threaded loops that trust their arguments. None of them depends on how the work was
// split, so results are the same for every number of threads.
#ifndef QCOMPILE_CPU_KERNEL_TABLE_H_
#define QCOMPILE_CPU_KERNEL_TABLE_H_

#include <cstdint>

#include "cache_row.h"
#include "packed_layout.h"

namespace qcompile::cpu {

enum class Activation : int { kSilu, kGelu, kGeluTanh, kRelu, kSigmoid, kTanh, kIdentity };

// Codes of activations that were fixed before: clamp(x / scale, least, most), rounded, + offset.
// The bounds are whole numbers with 0 between them; a NaN becomes the code of 0, which is `offset`.
struct StaticGrid {
  float scale;
  float least, most;
  int32_t offset;
};

// One row of float activations to int8 codes, per group or as one group.
struct QuantizeRow {
  const float* x;  // [k]
  int64_t k;
  int64_t padded_k;    // codes past k become 0
  int64_t group_size;  // of the weight: one sum of codes per group
  bool scale_per_group;
  const StaticGrid* grid;  // null: scales are measured
  int32_t largest;         // code that measured scales give the largest magnitude, 1 to 127
  int8_t* codes;           // [padded_k]
  int32_t* sums;           // [groups]
  float* scales;           // [groups], or [1]
};

// y[row][column] for a range of rows and of 16-column blocks.
struct LinearTile {
  const PackedLayout* layout;
  const uint8_t* weight;
  int64_t block_begin, block_end;
  int64_t row_begin, row_end;

  // Float activations: rows of padded_k floats, zero past k.
  const float* x;
  int64_t x_stride;
  // Integer activations: rows of padded_k codes, with their sums and scales per group.
  const int8_t* codes;
  const int32_t* sums;
  const float* scales;
  int64_t scales_per_row;  // groups, or 1
  // The same as PanelKernels take them: panels from row 0 on.
  const uint8_t* panels;

  const float* bias;      // [n] or null
  const float* residual;  // [rows, n] or null
  float* y;               // [rows, n]
  float* scratch;         // kLinearScratchFloats, or a panel's scratch_bytes; else unused
};

// Where keys (or values) of one head are: rows of a cache, or floats beside those of other heads.
struct CacheRows {
  const uint8_t* data;
  int64_t stride;  // bytes from one position to the next
  CacheRow row;
};

// Softmax attention of a few query rows over one key/value head.
struct AttentionTile {
  // Rows are consecutive queries of one head, or consecutive heads of one query.
  const float* q;  // first row, already rotated
  int64_t q_stride;
  float* out;
  int64_t out_stride;
  int64_t rows;
  bool rows_are_heads;
  int64_t first_position;  // position of the first row's query among the keys
  int64_t head_dim, value_dim;

  CacheRows keys;  // of head_dim numbers
  // Not null: the keys as transpose_keys makes them, kAttentionKeys at a time from key 0 on.
  const float* key_panels;
  CacheRows values;  // of value_dim numbers
  int64_t total;
  int64_t key_begin, key_end;  // keys that this call sees, from a multiple of kAttentionKeys on

  const float* mask;  // [total] zero where a key is hidden, or null
  const float* bias;  // first row's additive bias, [total], or null
  int64_t bias_stride;
  const float* sinks;  // first row's extra logit, or null
  int64_t sinks_stride;

  float scale;
  float softcap;   // 0: none
  bool causal;     // hides keys after the query
  int64_t window;  // hides keys `window` or more before the query; 0: none
  float* scratch;  // AttentionScratchFloats(head_dim, value_dim)

  // Not null: instead of `out`, rows of AttentionPartFloats(value_dim) are written, for others to
  // join: the sum of weighted values, its weight, and the logit that both are relative to.
  float* part;
};

constexpr int64_t kAttentionRows = 32;  // most rows of an AttentionTile
constexpr int64_t kAttentionKeys = 64;  // keys per step of the online softmax
constexpr int64_t kManyQueries = 9;     // from here on it pays to transpose keys

inline int64_t PadTo16(int64_t count) { return (count + 15) / 16 * 16; }

inline int64_t AttentionPartFloats(int64_t value_dim) { return PadTo16(value_dim) + 2; }

inline int64_t AttentionScratchFloats(int64_t head_dim, int64_t value_dim) {
  // Transposed and decoded keys, decoded values, scores, sums, and two numbers a row.
  return kAttentionKeys * (2 * head_dim + value_dim) +
         kAttentionRows * (kAttentionKeys + PadTo16(value_dim) + 2);
}

constexpr int64_t kLinearFloatRows = 128;   // most rows of a LinearTile with float activations
constexpr int64_t kLinearFloatDepth = 128;  // k that are dequantized at a time
constexpr int64_t kLinearFloatBlocks = 2;   // column blocks that are dequantized at a time
constexpr int64_t kLinearScratchFloats =
    (kLinearFloatDepth + kLinearFloatRows) * kLinearFloatBlocks * kColumns;

// Products for many rows. Activations are packed in panels of some rows, in a form of the kernel's
// own, and used for all columns.
struct PanelKernels {
  int64_t rows;        // of a panel
  int64_t least_rows;  // fewer do not repay the unpacking of the weights
  int64_t most_rows;   // of a LinearTile: a multiple of `rows`, or 0 for any number
  int64_t (*panel_bytes)(const PackedLayout& layout, int64_t scales_per_row);
  int64_t (*scratch_bytes)(const PackedLayout& layout);
  // Rows row_begin to row_end of a tile's activations, at most `rows`, as a panel.
  void (*pack)(const LinearTile& tile, uint8_t* panel);
  void (*multiply)(const LinearTile& tile);
};

// y = x W^T + bias for some rows of W, whose codes stand for vectors of a codebook.
struct VectorTile {
  int64_t k, group_size, dimension;  // both multiples of `dimension`
  int bits;
  const uint8_t* codes;   // of the first row, one byte more being readable behind the last one
  int64_t row_bytes;      // from one row to the next
  const float* scales;    // [columns][groups]
  const float* codebook;  // [2^bits][dimension]
  int64_t columns;        // rows of the weight

  const float* x;  // [rows, k]
  int64_t rows;
  const float* bias;  // [columns] or null
  float* y;           // [rows, columns] with a stride
  int64_t y_stride;
  float* scratch;  // kVectorScratchRows * k

  QCOMPILE_ALWAYS_INLINE int64_t groups() const { return (k + group_size - 1) / group_size; }
};

constexpr int64_t kVectorScratchRows = 4;

// One row of float activations times a Hadamard matrix per block: y = scale * x (I kron C kron S).
struct HadamardRow {
  const float* x;  // [n]
  float* y;        // [n], not x
  int64_t n;
  int64_t block;       // divides n
  int64_t core_order;  // 1, or a multiple of 4; block / core_order is a power of two
  const float* core;   // [core_order, core_order], or null for 1
  float scale;
  float* scratch;  // [block]; null where there is no core
};

struct KernelTable {
  const char* name;
  void (*quantize_row)(const QuantizeRow& row);
  void (*linear_int8)(const LinearTile& tile);
  void (*linear_float)(const LinearTile& tile);
  const PanelKernels* panels;  // of integer activations: as linear_int8, bit for bit
  // Of float activations, to about 2^-16 of a product; null where linear_float is as good.
  const PanelKernels* float_panels;
  void (*linear_vectors)(const VectorTile& tile);
  void (*attention)(const AttentionTile& tile);
  // The numbers of one head and position as a cache keeps them: row.bytes() bytes.
  void (*encode_cache_row)(const CacheRow& row, const float* x, uint8_t* bytes);
  // Positions from `first` on as floats: one behind the other, or, at most kAttentionKeys of them,
  // as [width][kAttentionKeys] with zeros after the last (`scratch`: as many floats again).
  void (*decode_cache_rows)(const CacheRows& rows, int64_t first, int64_t count, float* out);
  void (*transpose_keys)(const CacheRows& keys, int64_t first, int64_t count, float* scratch,
                         float* out);
  void (*rms_norm)(const float* x, const float* weight, float* y, int64_t dim, float epsilon);
  void (*gated_activation)(Activation kind, const float* gate, const float* up, float* y,
                           int64_t count);
  void (*hadamard)(const HadamardRow& row);
};

extern const KernelTable kScalarKernels;
#if defined(__x86_64__)
extern const KernelTable kAvx2Kernels;
#if defined(QCOMPILE_AVX_VNNI)
extern const KernelTable kAvxVnniKernels;
#endif
extern const KernelTable kAvx512Kernels;
extern const KernelTable kAmxKernels;
#endif

// Whether panels multiply as the rows of a table do, on some small products.
bool PanelsMultiplyLike(const PanelKernels& panels, const KernelTable& rows);
bool FloatPanelsMultiplyLike(const PanelKernels& panels, const KernelTable& rows);

}  // namespace qcompile::cpu

#endif  // QCOMPILE_CPU_KERNEL_TABLE_H_
