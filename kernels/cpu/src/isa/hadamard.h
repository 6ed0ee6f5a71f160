// Products with Hadamard matrices: Sylvester's factor by additions, the core as a matrix.
//
// Included after one of the simd_*.h.
#ifndef QCOMPILE_CPU_ISA_HADAMARD_H_
#define QCOMPILE_CPU_ISA_HADAMARD_H_

#include "kernel_table.h"

namespace qcompile::cpu {
namespace {

constexpr int64_t kSylvester = 16;  // order of the matrix that is multiplied within a vector

// The sign of entry [row][column] of Sylvester's matrix: the parity of the bits that both have.
inline float SylvesterSign(int row, int column) {
  int common = row & column, odd = 0;
  for (; common != 0; common &= common - 1) odd ^= 1;
  return odd != 0 ? -1.0f : 1.0f;
}

struct SylvesterRows {
  float rows[kSylvester][kSylvester];
  SylvesterRows() {
    for (int i = 0; i < kSylvester; ++i) {
      for (int j = 0; j < kSylvester; ++j) rows[i][j] = SylvesterSign(i, j);
    }
  }
};

// In place, for sizes below a vector.
inline void SmallSylvester(float* x, int64_t size) {
  for (int64_t half = 1; half < size; half *= 2) {
    for (int64_t i = 0; i < size; i += 2 * half) {
      for (int64_t j = i; j < i + half; ++j) {
        const float a = x[j], b = x[j + half];
        x[j] = a + b;
        x[j + half] = a - b;
      }
    }
  }
}

// y = x times Sylvester's matrix of order `size`, a power of two of at least 16.
inline void Sylvester(const float* x, float* y, int64_t size) {
  static const SylvesterRows table;
  F rows[kSylvester];
  for (int i = 0; i < kSylvester; ++i) rows[i] = Load(table.rows[i]);
  for (int64_t i = 0; i < size; i += kSylvester) {
    // Four sums, so that additions need not wait for each other.
    F sums[4];
    for (int k = 0; k < 4; ++k) sums[k] = Set1(x[i + k]) * rows[k];
    for (int k = 4; k < kSylvester; ++k) sums[k % 4] = Fma(Set1(x[i + k]), rows[k], sums[k % 4]);
    Store(y + i, (sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
  for (int64_t half = kSylvester; half < size; half *= 2) {
    for (int64_t i = 0; i < size; i += 2 * half) {
      for (int64_t j = i; j < i + half; j += kSylvester) {
        const F a = Load(y + j), b = Load(y + j + half);
        Store(y + j, a + b);
        Store(y + j + half, a - b);
      }
    }
  }
}

// y[i][j] = scale * sum over k of core[k][i] x[k][j], for j < width.
inline void MultiplyCore(const float* core, int64_t order, const float* x, int64_t width,
                         float scale, float* y) {
  constexpr int kRows = 4;  // rows of y that share a load of x
  for (int64_t j = 0; j < width; j += kSylvester) {
    const int64_t lanes = width - j < kSylvester ? width - j : kSylvester;
    for (int64_t i = 0; i < order; i += kRows) {
      F sums[kRows] = {Zero(), Zero(), Zero(), Zero()};
      for (int64_t k = 0; k < order; ++k) {
        const F value = LoadN(x + k * width + j, lanes);
        for (int r = 0; r < kRows; ++r)
          sums[r] = Fma(Set1(core[k * order + i + r]), value, sums[r]);
      }
      for (int r = 0; r < kRows; ++r) StoreN(y + (i + r) * width + j, sums[r] * Set1(scale), lanes);
    }
  }
}

void Hadamard(const HadamardRow& row) {
  const int64_t power = row.block / row.core_order;
  for (int64_t begin = 0; begin < row.n; begin += row.block) {
    const float* x = row.x + begin;
    float* y = row.y + begin;
    float* mixed = row.core_order == 1 ? y : row.scratch;
    for (int64_t part = 0; part < row.block; part += power) {
      if (power >= kSylvester) {
        Sylvester(x + part, mixed + part, power);
      } else {
        for (int64_t j = part; j < part + power; ++j) mixed[j] = x[j];
        SmallSylvester(mixed + part, power);
      }
    }
    if (row.core_order != 1) {
      MultiplyCore(row.core, row.core_order, mixed, power, row.scale, y);
    } else {
      for (int64_t j = 0; j < row.block; j += kSylvester) {
        const int64_t lanes = row.block - j < kSylvester ? row.block - j : kSylvester;
        StoreN(y + j, LoadN(y + j, lanes) * Set1(row.scale), lanes);
      }
    }
  }
}

}  // namespace
}  // namespace qcompile::cpu

#endif  // QCOMPILE_CPU_ISA_HADAMARD_H_
