// Matrix products with packed weights.
#ifndef QCOMPILE_CPU_ISA_LINEAR_H_
#define QCOMPILE_CPU_ISA_LINEAR_H_

#include <cstring>

#include "elementwise.h"
// What follows uses it.
#include "codes.h"
#include "gemm.h"
#include "kernel_table.h"

namespace qcompile::cpu {
namespace {

// What stands at the head of a group is read by branches that always go the same way: they cost
// less than six times the code does.
inline F ReadScales(const LinearTile& t, const uint8_t* header, int64_t block) {
  const PackedLayout& layout = *t.layout;
  float scales[kColumns];
  switch (layout.scale_type) {
    case ScaleType::kFloat16:
      return LoadHalf(header);
    case ScaleType::kBfloat16:
      return LoadBrain(header);
    case ScaleType::kE8m0: {
      // The exponent 0 stands for 2^-127, which a float32 spells as half of its least exponent.
      constexpr int32_t kHalf = 1 << 22;
      return AsFloat(Max(ShiftLeft<23>(LoadBytesAsInts(header)), Set1(kHalf)));
    }
    case ScaleType::kE4m3:
      memcpy(scales, t.weight + layout.outer_scales_at(block), sizeof(scales));
      return AsFloat(ShiftLeft<20>(LoadBytesAsInts(header))) * Set1(kE4m3Exponents) * Load(scales);
    case ScaleType::kUint8:
      memcpy(scales, t.weight + layout.outer_scales_at(block), sizeof(scales));
      return ToFloat(LoadBytesAsInts(header)) * Load(scales);
    case ScaleType::kFloat32:
      break;
  }
  memcpy(scales, header, sizeof(scales));
  return Load(scales);
}

inline void StoreResult(const LinearTile& t, int64_t row, int64_t block, F sum) {
  const int64_t column = block * kColumns;
  const int64_t n = Least(kColumns, t.layout->n - column);
  const int64_t at = row * t.layout->n + column;
  if (t.bias != nullptr) sum = sum + LoadN(t.bias + column, n);
  if (t.residual != nullptr) sum = sum + LoadN(t.residual + at, n);
  StoreN(t.y + at, sum, n);
}

// What float zero points are above the middle code, which whole numbers are summed up with.
inline F ReadZeroRests(const PackedLayout& layout, const uint8_t* header) {
  return ReadFloatZeros(layout, header) - Set1(static_cast<float>(1 << (layout.bits - 1)));
}

// The products of a group, summed up to `exact`, less what the rest of its zero points takes from
// them; `sum` is that of the activations.
QCOMPILE_ALWAYS_INLINE F FloatSum(I exact, bool has_rest, F rest, int32_t sum) {
  const F product = ToFloat(exact);
  return has_rest ? Fma(Set1(static_cast<float>(-sum)), rest, product) : product;
}

// kRows rows by kBlocks column blocks; rows from `rows` on repeat the last one and are not stored.
template <class Codes, int kRows, int kBlocks>
void LinearInt8Block(const LinearTile& t, int64_t row, int64_t rows, int64_t block) {
  // Two sums per output where registers allow: the latency of one dot product is several cycles.
  constexpr int kChains = kRows * kBlocks <= kChainedOutputs ? 2 : 1;
  const Codes coding(t);
  const PackedLayout& layout = *t.layout;
  const int64_t groups = layout.groups(), padded_k = layout.padded_k();
  const int64_t block_bytes = layout.column_block_bytes(), header_bytes = layout.header_bytes();
  const bool has_rest = layout.float_zero_point;

  const int8_t* a[kRows];
  const int32_t* sums[kRows];
  const float* scales[kRows];
  for (int r = 0; r < kRows; ++r) {
    const int64_t from = row + Least(r, rows - 1);
    a[r] = t.codes + from * padded_k;
    sums[r] = t.sums + from * groups;
    scales[r] = t.scales + from * t.scales_per_row;
  }
  const uint8_t* header = t.weight + layout.block_at(block);
  const int64_t scale_step = t.scales_per_row == 1 ? 0 : 1;

  F total[kRows][kBlocks];
  for (int r = 0; r < kRows; ++r) {
    for (int b = 0; b < kBlocks; ++b) total[r][b] = Zero();
  }
  int64_t k = 0;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t units = layout.group_units(g), quads = units * (kUnit / kQuad);
    I dot[kRows][kBlocks][kChains];
#pragma GCC unroll 4
    for (int b = 0; b < kBlocks; ++b) {
      const I zero = coding.Zero(coding.ReadGroup(layout, header + b * block_bytes));
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        // What zero points take from the product of the raw codes.
        dot[r][b][0] = zero * Set1(-sums[r][g]);
        if constexpr (kChains == 2) dot[r][b][1] = ZeroI();
      }
    }
    int64_t begin = 0;
    if constexpr (kRows * kBlocks == 1 && Codes::kDotsWhole) {
      begin = Codes::DotWhole(header + header_bytes, quads, a[0] + k, &dot[0][0][0]);
      k += begin * kQuad;
    }
    Codes::template ForEachQuad<kBlocks>(
        header + header_bytes, block_bytes, {begin, quads, quads},
        [&](const Bytes* quad, auto parity) __attribute__((always_inline)) {
          Bytes bytes[kBlocks];
#pragma GCC unroll 4
          for (int b = 0; b < kBlocks; ++b) bytes[b] = coding.ToBytes(quad[b]);
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) {
            const int32_t four = LoadFour(a[r] + k);
#pragma GCC unroll 4
            for (int b = 0; b < kBlocks; ++b) {
              I* sum = &dot[r][b][decltype(parity)::value * (kChains - 1)];
              *sum = DotAccumulate<Codes::kByteBits>(*sum, bytes[b], four);
            }
          }
          k += kQuad;
        });
#pragma GCC unroll 4
    for (int b = 0; b < kBlocks; ++b) {
      F weight_scale = ReadScales(t, header + b * block_bytes, block + b);
      if constexpr (Codes::kStep != 1.0f) weight_scale = weight_scale * Set1(Codes::kStep);
      const F rest = has_rest ? ReadZeroRests(layout, header + b * block_bytes) : Zero();
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        I exact = dot[r][b][0];
        if constexpr (kChains == 2) exact = exact + dot[r][b][1];
        const F scale = weight_scale * Set1(scales[r][g * scale_step]);
        const F product = FloatSum(exact, has_rest, rest, sums[r][g]);
        total[r][b] = Fma(product, scale, total[r][b]);
      }
    }
    header += header_bytes + layout.code_bytes(units);
  }
  for (int r = 0; r < kRows && r < rows; ++r) {
    for (int b = 0; b < kBlocks; ++b) StoreResult(t, row + r, block + b, total[r][b]);
  }
}

// All rows of the tile over kBlocks column blocks, which stay in cache from one pass to the next.
template <class Codes, int kBlocks>
inline void LinearInt8Columns(const LinearTile& t, int64_t block) {
  constexpr int kMost = kLinearRows;
  for (int64_t row = t.row_begin; row < t.row_end; row += kMost) {
    const int64_t rows = Least(kMost, t.row_end - row);
    if (rows == 1) {
      LinearInt8Block<Codes, 1, kBlocks>(t, row, rows, block);
    } else if (rows == 2) {
      LinearInt8Block<Codes, 2, kBlocks>(t, row, rows, block);
    } else if (rows <= 4 || kMost == 4) {
      LinearInt8Block<Codes, 4, kBlocks>(t, row, rows, block);
    } else {
      LinearInt8Block<Codes, kMost, kBlocks>(t, row, rows, block);
    }
  }
}

struct LinearInt8Kernel {
  template <class Codes>
  static void Run(const LinearTile& t) {
    // One row is bound by memory, which is read fastest as a single stream.
    int64_t block = t.block_begin;
    if constexpr (kRowBlocks >= 2) {
      for (; t.row_end - t.row_begin > 1 && block + 2 <= t.block_end; block += 2) {
        LinearInt8Columns<Codes, 2>(t, block);
      }
    }
    for (; block < t.block_end; ++block) LinearInt8Columns<Codes, 1>(t, block);
  }
};

// Float activations, few rows: weights go from registers straight into the product.
template <class Codes, int kRows>
void LinearFloatRows(const LinearTile& t, int64_t row, int64_t rows, int64_t block) {
  const Codes coding(t);
  const PackedLayout& layout = *t.layout;
  const int64_t header_bytes = layout.header_bytes();
  const float* x[kRows];
  for (int r = 0; r < kRows; ++r) x[r] = t.x + (row + Least(r, rows - 1)) * t.x_stride;
  const uint8_t* header = t.weight + layout.block_at(block);
  F total[kRows];
  for (int r = 0; r < kRows; ++r) total[r] = Zero();

  int64_t k = 0;
  for (int64_t g = 0; g < layout.groups(); ++g) {
    const auto group = coding.ReadGroup(layout, header);
    const int64_t units = layout.group_units(g), quads = units * (kUnit / kQuad);
    F part[kRows][4];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) part[r][j] = Zero();
    }
    Codes::template ForEachQuad<1>(header + header_bytes, 0, {0, quads, quads},
                                   [&](const Bytes* quad, auto) __attribute__((always_inline)) {
                                     const F w[4] = {coding.template Value<0>(*quad, group),
                                                     coding.template Value<1>(*quad, group),
                                                     coding.template Value<2>(*quad, group),
                                                     coding.template Value<3>(*quad, group)};
#pragma GCC unroll 4
                                     for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
                                       for (int j = 0; j < 4; ++j)
                                         part[r][j] = Fma(Set1(x[r][k + j]), w[j], part[r][j]);
                                     }
                                     k += kQuad;
                                   });
    const F scale = ReadScales(t, header, block);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      total[r] = Fma((part[r][0] + part[r][1]) + (part[r][2] + part[r][3]), scale, total[r]);
    }
    header += header_bytes + layout.code_bytes(units);
  }
  for (int r = 0; r < kRows && r < rows; ++r) StoreResult(t, row + r, block, total[r]);
}

// Calls body(four vectors of 16 columns) for every quad of `begin` <= k < `end` of a column block.
template <class Codes, class Body>
QCOMPILE_ALWAYS_INLINE void ForEachValue(const LinearTile& t, int64_t block, int64_t begin,
                                         int64_t end, Body body) {
  const Codes coding(t);
  const PackedLayout& layout = *t.layout;
  const uint8_t* head = t.weight + layout.block_at(block);
  for (int64_t k = begin; k < end;) {
    const int64_t g = k / layout.group_size, group_begin = g * layout.group_size;
    const int64_t length = layout.group_units(g) * kUnit;
    const int64_t stop = Least(end, group_begin + length);
    const uint8_t* header = head + g * layout.group_bytes();
    const F scale = ReadScales(t, header, block);
    const auto group = coding.ReadGroup(layout, header);
    const QuadRange range = {(k - group_begin) / kQuad, (stop - group_begin) / kQuad,
                             length / kQuad};
    Codes::template ForEachQuad<1>(header + layout.header_bytes(), 0, range,
                                   [&](const Bytes* quad, auto) __attribute__((always_inline)) {
                                     const F w[kQuad] = {
                                         coding.template Value<0>(*quad, group) * scale,
                                         coding.template Value<1>(*quad, group) * scale,
                                         coding.template Value<2>(*quad, group) * scale,
                                         coding.template Value<3>(*quad, group) * scale};
                                     body(w);
                                   });
    k = stop;
  }
}

// Weights of `begin` <= k < `end` of one column block to floats, [end - begin][16] in `out`.
template <class Codes>
inline void DequantizeBlock(const LinearTile& t, int64_t block, int64_t begin, int64_t end,
                            float* out, int64_t out_stride) {
  ForEachValue<Codes>(t, block, begin, end, [&](const F* w) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int i = 0; i < kQuad; ++i, out += out_stride) Store(out, w[i]);
  });
}

struct LinearFloatKernel {
  template <class Codes>
  static void Run(const LinearTile& t) {
    const int64_t rows = t.row_end - t.row_begin;
    if (rows <= 4) {
      for (int64_t block = t.block_begin; block < t.block_end; ++block) {
        if (rows == 1) {
          LinearFloatRows<Codes, 1>(t, t.row_begin, rows, block);
        } else {
          LinearFloatRows<Codes, 4>(t, t.row_begin, rows, block);
        }
      }
      return;
    }
    // More rows share one dequantization of each panel of weights.
    constexpr int64_t kStride = kLinearFloatBlocks * kColumns;
    const int64_t padded_k = t.layout->padded_k();
    float* panel = t.scratch;
    float* sums = panel + kLinearFloatDepth * kStride;
    for (int64_t block = t.block_begin; block < t.block_end; block += kLinearFloatBlocks) {
      const int64_t blocks = Least(kLinearFloatBlocks, t.block_end - block);
      memset(sums, 0, sizeof(float) * rows * kStride);
      for (int64_t k = 0; k < padded_k; k += kLinearFloatDepth) {
        const int64_t end = Least(k + kLinearFloatDepth, padded_k);
        for (int64_t b = 0; b < blocks; ++b) {
          DequantizeBlock<Codes>(t, block + b, k, end, panel + b * kColumns, kStride);
        }
        const float* x = t.x + t.row_begin * t.x_stride + k;
        const Gemm product = {x, t.x_stride, panel, kStride, sums, kStride, end - k};
        GemmAccumulate(product, rows, blocks * kColumns);
      }
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t b = 0; b < blocks; ++b) {
          StoreResult(t, t.row_begin + r, block + b, Load(sums + r * kStride + b * kColumns));
        }
      }
    }
  }
};

// Runs Kernel::Run<Codes>(t) for codes that are multiplied as bytes.
template <class Kernel>
inline void WithByteCodes(const LinearTile& t) {
  switch (t.layout->coding) {
    case Coding::kE2m1:
      return Kernel::template Run<E2m1Codes>(t);
    case Coding::kTernary:
      return Kernel::template Run<TernaryCodes>(t);
    default:  // the operator refuses others
      return WithIntegers<Kernel>(t);
  }
}

void LinearInt8(const LinearTile& t) { WithByteCodes<LinearInt8Kernel>(t); }

// Runs Kernel::Run<Codes>(t) for any codes.
template <class Kernel>
inline void WithCodes(const LinearTile& t) {
  switch (t.layout->coding) {
    case Coding::kTable:
      return WithTable<Kernel>(t);
    case Coding::kE2m1:
      return Kernel::template Run<E2m1Codes>(t);
    case Coding::kE4m3:
      return Kernel::template Run<E4m3Codes>(t);
    case Coding::kTernary:
      return Kernel::template Run<TernaryCodes>(t);
    case Coding::kInteger:
      break;
  }
  WithIntegers<Kernel>(t);
}

void LinearFloat(const LinearTile& t) { WithCodes<LinearFloatKernel>(t); }

}  // namespace
}  // namespace qcompile::cpu

#endif  // QCOMPILE_CPU_ISA_LINEAR_H_
