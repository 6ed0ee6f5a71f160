// Matrix products with packed weights.
#ifndef QCOMPILE_CPU_ISA_LINEAR_H_
#define QCOMPILE_CPU_ISA_LINEAR_H_

#include <cstring>

#include "elementwise.h"
#include "gemm.h"
#include "kernel_table.h"

namespace qcompile::cpu {
namespace {

// How far ahead of the codes in use the next ones are asked for, in bytes. Far enough to run into
// the column blocks that follow: short rows of codes would else begin with a wait for memory.
constexpr int64_t kPrefetch = 12288;

template <int kBits>
constexpr int64_t kUnitBytes = kColumns * kBits;

// One unit of codes: 8 consecutive k of 16 columns. The planes are the binary digits of kBits, and
// each begins where those before it end: in the codes, and, 16 times as far, in the unit.
template <int kBits>
inline void Unpack(const uint8_t* p, Bytes* first, Bytes* second) {
  static_assert(kBits >= 1 && kBits <= 8);
  if constexpr ((kBits & 8) != 0) ReadPlane<8, 0>(p, first, second);
  if constexpr ((kBits & 4) != 0) ReadPlane<4, 0>(p, first, second);
  if constexpr ((kBits & 2) != 0) {
    constexpr int kBefore = kBits & 4;
    ReadPlane<2, kBefore>(p + kColumns * kBefore, first, second);
  }
  if constexpr ((kBits & 1) != 0) {
    constexpr int kBefore = kBits & 6;
    ReadPlane<1, kBefore>(p + kColumns * kBefore, first, second);
  }
}

// What stands at the head of a group is read by branches that always go the same way: they cost
// less than six times the code does.
inline F ReadScales(const PackedLayout& layout, const uint8_t* header) {
  switch (layout.scale_type) {
    case ScaleType::kFloat16:
      return LoadHalf(header);
    case ScaleType::kBfloat16:
      return LoadBrain(header);
    case ScaleType::kFloat32:
      break;
  }
  float scales[kColumns];
  memcpy(scales, header, sizeof(scales));
  return Load(scales);
}

inline I ReadZeroPoints(const PackedLayout& layout, const uint8_t* header) {
  return layout.has_zero_point ? LoadBytesAsInts(header + layout.scale_bytes())
                               : Set1(1 << (layout.bits - 1));
}

inline void StoreResult(const LinearTile& t, int64_t row, int64_t block, F sum) {
  const int64_t column = block * kColumns;
  const int64_t n = Least(kColumns, t.layout->n - column);
  const int64_t at = row * t.layout->n + column;
  if (t.bias != nullptr) sum = sum + LoadN(t.bias + column, n);
  if (t.residual != nullptr) sum = sum + LoadN(t.residual + at, n);
  StoreN(t.y + at, sum, n);
}

inline int32_t LoadFour(const int8_t* codes) {
  int32_t four;
  memcpy(&four, codes, sizeof(four));
  return four;
}

// kRows rows by kBlocks column blocks; rows from `rows` on repeat the last one and are not stored.
template <int kBits, int kRows, int kBlocks>
void LinearInt8Block(const LinearTile& t, int64_t row, int64_t rows, int64_t block) {
  // Two sums per output where registers allow: the latency of one dot product is several cycles.
  constexpr int kChains = kRows * kBlocks <= kChainedOutputs ? 2 : 1;
  const PackedLayout& layout = *t.layout;
  const int64_t groups = layout.groups(), padded_k = layout.padded_k();
  const int64_t block_bytes = layout.column_block_bytes(), header_bytes = layout.header_bytes();

  const int8_t* a[kRows];
  const int32_t* sums[kRows];
  const float* scales[kRows];
  for (int r = 0; r < kRows; ++r) {
    const int64_t from = row + Least(r, rows - 1);
    a[r] = t.codes + from * padded_k;
    sums[r] = t.sums + from * groups;
    scales[r] = t.scales + from * t.scales_per_row;
  }
  const uint8_t* p = t.weight + block * block_bytes;
  const int64_t scale_step = t.scales_per_row == 1 ? 0 : 1;

  F total[kRows][kBlocks];
  for (int r = 0; r < kRows; ++r) {
    for (int b = 0; b < kBlocks; ++b) total[r][b] = Zero();
  }
  int64_t k = 0;
  for (int64_t g = 0; g < groups; ++g) {
    const uint8_t* header = p;
    const int64_t units = layout.group_units(g);
    I dot[kRows][kBlocks][kChains];
#pragma GCC unroll 4
    for (int b = 0; b < kBlocks; ++b) {
      const I zero = ReadZeroPoints(layout, header + b * block_bytes);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        // What zero points take from the product of the raw codes.
        dot[r][b][0] = zero * Set1(-sums[r][g]);
        if constexpr (kChains == 2) dot[r][b][1] = ZeroI();
      }
    }
    p += header_bytes;
    for (int64_t u = 0; u < units; ++u, k += kUnit, p += kUnitBytes<kBits>) {
      Bytes first[kBlocks], second[kBlocks];
#pragma GCC unroll 4
      for (int b = 0; b < kBlocks; ++b) {
        Unpack<kBits>(p + b * block_bytes, &first[b], &second[b]);
        for (int64_t line = 0; line < kUnitBytes<kBits>; line += 64) {
          __builtin_prefetch(p + b * block_bytes + line + kPrefetch);
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const int32_t low = LoadFour(a[r] + k), high = LoadFour(a[r] + k + 4);
#pragma GCC unroll 4
        for (int b = 0; b < kBlocks; ++b) {
          I* sum = dot[r][b];
          sum[0] = DotAccumulate<kBits>(sum[0], first[b], low);
          sum[kChains - 1] = DotAccumulate<kBits>(sum[kChains - 1], second[b], high);
        }
      }
    }
#pragma GCC unroll 4
    for (int b = 0; b < kBlocks; ++b) {
      const F weight_scale = ReadScales(layout, header + b * block_bytes);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        I exact = dot[r][b][0];
        if constexpr (kChains == 2) exact = exact + dot[r][b][1];
        const F scale = weight_scale * Set1(scales[r][g * scale_step]);
        total[r][b] = Fma(ToFloat(exact), scale, total[r][b]);
      }
    }
  }
  for (int r = 0; r < kRows && r < rows; ++r) {
    for (int b = 0; b < kBlocks; ++b) StoreResult(t, row + r, block + b, total[r][b]);
  }
}

// All rows of the tile over kBlocks column blocks, which stay in cache from one pass to the next.
template <int kBits, int kBlocks>
inline void LinearInt8Columns(const LinearTile& t, int64_t block) {
  constexpr int kMost = kLinearRows;
  for (int64_t row = t.row_begin; row < t.row_end; row += kMost) {
    const int64_t rows = Least(kMost, t.row_end - row);
    if (rows == 1) {
      LinearInt8Block<kBits, 1, kBlocks>(t, row, rows, block);
    } else if (rows == 2) {
      LinearInt8Block<kBits, 2, kBlocks>(t, row, rows, block);
    } else if (rows <= 4 || kMost == 4) {
      LinearInt8Block<kBits, 4, kBlocks>(t, row, rows, block);
    } else {
      LinearInt8Block<kBits, kMost, kBlocks>(t, row, rows, block);
    }
  }
}

struct LinearInt8Kernel {
  template <int kBits>
  static void Run(const LinearTile& t) {
    // One row is bound by memory, which is read fastest as a single stream.
    int64_t block = t.block_begin;
    if constexpr (kRowBlocks >= 2) {
      for (; t.row_end - t.row_begin > 1 && block + 2 <= t.block_end; block += 2) {
        LinearInt8Columns<kBits, 2>(t, block);
      }
    }
    for (; block < t.block_end; ++block) LinearInt8Columns<kBits, 1>(t, block);
  }
};

// Float activations, few rows: weights go from registers straight into the product.
template <int kBits, int kRows>
void LinearFloatRows(const LinearTile& t, int64_t row, int64_t rows, int64_t block) {
  const PackedLayout& layout = *t.layout;
  const int64_t header_bytes = layout.header_bytes();
  const float* x[kRows];
  for (int r = 0; r < kRows; ++r) x[r] = t.x + (row + Least(r, rows - 1)) * t.x_stride;
  const uint8_t* p = t.weight + block * layout.column_block_bytes();
  F total[kRows];
  for (int r = 0; r < kRows; ++r) total[r] = Zero();

  int64_t k = 0;
  for (int64_t g = 0; g < layout.groups(); ++g) {
    const F scale = ReadScales(layout, p);
    const I zero = ReadZeroPoints(layout, p);
    const int64_t units = layout.group_units(g);
    p += header_bytes;
    F part[kRows][4];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) part[r][j] = Zero();
    }
    for (int64_t u = 0; u < units; ++u, p += kUnitBytes<kBits>) {
      __builtin_prefetch(p + kPrefetch);
      Bytes codes[2];
      Unpack<kBits>(p, &codes[0], &codes[1]);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half, k += 4) {
        const F w[4] = {ToFloat(ExtractByte<0>(codes[half]) - zero),
                        ToFloat(ExtractByte<1>(codes[half]) - zero),
                        ToFloat(ExtractByte<2>(codes[half]) - zero),
                        ToFloat(ExtractByte<3>(codes[half]) - zero)};
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
          for (int j = 0; j < 4; ++j) part[r][j] = Fma(Set1(x[r][k + j]), w[j], part[r][j]);
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      total[r] = Fma((part[r][0] + part[r][1]) + (part[r][2] + part[r][3]), scale, total[r]);
    }
  }
  for (int r = 0; r < kRows && r < rows; ++r) StoreResult(t, row + r, block, total[r]);
}

// Weights of `begin` <= k < `end` of one column block to floats, [end - begin][16] in `out`.
template <int kBits>
inline void DequantizeBlock(const LinearTile& t, int64_t block, int64_t begin, int64_t end,
                            float* out, int64_t out_stride) {
  const PackedLayout& layout = *t.layout;
  const uint8_t* head = t.weight + block * layout.column_block_bytes();
  for (int64_t k = begin; k < end;) {
    const int64_t g = k / layout.group_size, group_begin = g * layout.group_size;
    const int64_t stop = Least(end, group_begin + layout.group_units(g) * kUnit);
    const uint8_t* header = head + g * layout.group_bytes();
    const F scale = ReadScales(layout, header);
    const I zero = ReadZeroPoints(layout, header);
    const uint8_t* p =
        header + layout.header_bytes() + (k - group_begin) / kUnit * kUnitBytes<kBits>;
    for (; k < stop; k += kUnit, p += kUnitBytes<kBits>) {
      Bytes codes[2];
      Unpack<kBits>(p, &codes[0], &codes[1]);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half, out += 4 * out_stride) {
        Store(out, ToFloat(ExtractByte<0>(codes[half]) - zero) * scale);
        Store(out + out_stride, ToFloat(ExtractByte<1>(codes[half]) - zero) * scale);
        Store(out + 2 * out_stride, ToFloat(ExtractByte<2>(codes[half]) - zero) * scale);
        Store(out + 3 * out_stride, ToFloat(ExtractByte<3>(codes[half]) - zero) * scale);
      }
    }
  }
}

struct LinearFloatKernel {
  template <int kBits>
  static void Run(const LinearTile& t) {
    const int64_t rows = t.row_end - t.row_begin;
    if (rows <= 4) {
      for (int64_t block = t.block_begin; block < t.block_end; ++block) {
        if (rows == 1) {
          LinearFloatRows<kBits, 1>(t, t.row_begin, rows, block);
        } else {
          LinearFloatRows<kBits, 4>(t, t.row_begin, rows, block);
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
          DequantizeBlock<kBits>(t, block + b, k, end, panel + b * kColumns, kStride);
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

template <class Kernel>
void Linear(const LinearTile& t) {
  switch (t.layout->bits) {
    case 1:
      return Kernel::template Run<1>(t);
    case 2:
      return Kernel::template Run<2>(t);
    case 3:
      return Kernel::template Run<3>(t);
    case 4:
      return Kernel::template Run<4>(t);
    case 5:
      return Kernel::template Run<5>(t);
    case 6:
      return Kernel::template Run<6>(t);
    case 7:
      return Kernel::template Run<7>(t);
    default:
      return Kernel::template Run<8>(t);
  }
}

}  // namespace
}  // namespace qcompile::cpu

#endif  // QCOMPILE_CPU_ISA_LINEAR_H_
