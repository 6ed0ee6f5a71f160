// A float matrix product of cache-resident operands: C[rows, cols] (+)= A[rows, depth] B[depth,
// cols].
#ifndef QCOMPILE_CPU_ISA_GEMM_H_
#define QCOMPILE_CPU_ISA_GEMM_H_

#include <cstdint>

namespace qcompile::cpu {
namespace {

struct Gemm {
  const float* a;
  int64_t a_stride;
  const float* b;
  int64_t b_stride;
  float* c;  // rows are padded to a multiple of 16 floats
  int64_t c_stride;
  int64_t depth;
};

// kRows x (16 * kVectors) of C in registers. With kTail the last 16 columns of B have only `lanes`.
template <int kRows, int kVectors, bool kTail>
inline void GemmBlock(const Gemm& g, int64_t row, int64_t column, int64_t lanes) {
  F sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sum[r][v] = Load(g.c + (row + r) * g.c_stride + column + 16 * v);
    }
  }
  const float* b = g.b + column;
  const float* a = g.a + row * g.a_stride;
  for (int64_t k = 0; k < g.depth; ++k, b += g.b_stride) {
    F w[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      w[v] = kTail && v == kVectors - 1 ? LoadN(b + 16 * v, lanes) : Load(b + 16 * v);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const F x = Set1(a[r * g.a_stride + k]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] = Fma(x, w[v], sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      Store(g.c + (row + r) * g.c_stride + column + 16 * v, sum[r][v]);
    }
  }
}

template <int kRows>
inline void GemmRows(const Gemm& g, int64_t row, int64_t columns) {
  // Few rows need more columns in flight to hide the latency of the multiply-add.
  constexpr int kVectors = kRows == 1 ? 4 : kRows <= 4 ? kThinVectors : kGemmVectors;
  int64_t column = 0;
  for (; column + 16 * kVectors <= columns; column += 16 * kVectors) {
    GemmBlock<kRows, kVectors, false>(g, row, column, 16);
  }
  for (; column + 16 <= columns; column += 16) GemmBlock<kRows, 1, false>(g, row, column, 16);
  if (column < columns) GemmBlock<kRows, 1, true>(g, row, column, columns - column);
}

// Accumulates into C, whose rows must be readable and writable up to a multiple of 16 columns.
inline void GemmAccumulate(const Gemm& g, int64_t rows, int64_t columns) {
  int64_t row = 0;
  for (; row + kGemmRows <= rows; row += kGemmRows) GemmRows<kGemmRows>(g, row, columns);
  for (; row + 4 <= rows; row += 4) GemmRows<4>(g, row, columns);
  switch (rows - row) {
    case 3:
      return GemmRows<3>(g, row, columns);
    case 2:
      return GemmRows<2>(g, row, columns);
    case 1:
      return GemmRows<1>(g, row, columns);
    default:
      return;
  }
}

}  // namespace
}  // namespace qcompile::cpu

#endif  // QCOMPILE_CPU_ISA_GEMM_H_
