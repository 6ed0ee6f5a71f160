// QLinear: y[..., N] = x[..., K] . weight[N, K]^T + bias + residual, with a packed weight.
#include <algorithm>
#include <cstring>

#include "packed_weight.h"

namespace qcompile::cpu {
namespace {

enum class ActivationFormat { kFloat, kInt8PerToken, kInt8PerGroup };

ActivationFormat ReadActivationFormat(const Attributes& attributes) {
  const std::string act = attributes.String("act", "float");
  if (act == "float") return ActivationFormat::kFloat;
  if (act == "int8_token") return ActivationFormat::kInt8PerToken;
  if (act == "int8_group") return ActivationFormat::kInt8PerGroup;
  Fail("act = '", act, "' is none of 'float', 'int8_token', 'int8_group'");
}

// How a product is cut: rows so that their activations stay in the second-level cache, columns so
// that a piece is some tens of kilobytes of weights. Neither changes any result.
struct Split {
  int64_t row_panel, row_panels;
  int64_t columns, column_tasks;
};

Split SplitWork(const PackedLayout& layout, int64_t rows, int64_t bytes_per_row,
                int64_t most_rows) {
  constexpr int64_t kPanelBytes = 512 * 1024;
  constexpr int64_t kTaskBytes = 32 * 1024;
  constexpr int64_t kBlockMultiple = 4;  // the widest kernel takes 4 column blocks at a time
  Split split;
  const int64_t fit = std::max<int64_t>(kPanelBytes / bytes_per_row / 8 * 8, 8);
  split.row_panel = std::min({rows, fit, most_rows});
  split.row_panels = (rows + split.row_panel - 1) / split.row_panel;
  const int64_t task_bytes = layout.column_block_bytes() * split.row_panel;
  const int64_t blocks = std::max<int64_t>(kTaskBytes / task_bytes, 1);
  split.columns = (blocks + kBlockMultiple - 1) / kBlockMultiple * kBlockMultiple;
  split.column_tasks = (layout.column_blocks() + split.columns - 1) / split.columns;
  return split;
}

class QLinear : public Operator {
 public:
  QLinear(const Attributes& attributes, const KernelTable& kernels)
      : layout_(ReadLayout(attributes)),
        format_(ReadActivationFormat(attributes)),
        kernels_(kernels) {
    // 255 * 127 * 65536 is the largest dot product that int32 holds.
    constexpr int64_t kLongestGroup = 65536;
    Require(format_ == ActivationFormat::kFloat || layout_.group_size <= kLongestGroup,
            "int8 activations need groups of at most ", kLongestGroup, " along K, not ",
            layout_.group_size);
    const bool has_bytes = layout_.coding != Coding::kTable && layout_.coding != Coding::kE4m3;
    Require(format_ == ActivationFormat::kFloat || has_bytes,
            "int8 activations need a weight of whole numbers: the coding is neither 'integer', "
            "'e2m1' nor 'ternary'");
  }

  void Compute(const Context& context) const override {
    const auto x = context.Input<float>(0);
    Require(x.shape.rank >= 1 && x.shape[-1] == layout_.k, "x has shape ", x.shape,
            ", but K = ", layout_.k);
    const auto weight = context.Input<uint8_t>(1);
    const auto bias = context.Input<float>(2);
    const auto residual = context.Input<float>(3);
    Shape shape = x.shape;
    shape.dims[shape.rank - 1] = layout_.n;
    Require(!bias || (bias.shape.rank == 1 && bias.shape[0] == layout_.n), "bias has shape ",
            bias.shape, " instead of [", layout_.n, "]");
    Require(!residual || residual.shape == shape, "residual has shape ", residual.shape,
            ", but the output has ", shape);

    LinearTile tile = {};
    tile.layout = &layout_;
    tile.weight = CheckedWeight(weight, layout_);
    tile.bias = bias.data;
    tile.residual = residual.data;
    tile.y = context.Output(0, shape).data;
    const int64_t rows = x.shape.Count() / layout_.k;
    if (rows == 0) return;
    if (format_ == ActivationFormat::kFloat) {
      ComputeFloat(context, x.data, rows, tile);
    } else {
      ComputeInt8(context, x.data, rows, tile);
    }
  }

 private:
  void ComputeFloat(const Context& context, const float* x, int64_t rows, LinearTile tile) const {
    const int64_t padded_k = layout_.padded_k();
    tile.x = x;
    tile.x_stride = layout_.k;
    if (padded_k != layout_.k) {
      float* padded = ScratchFloats(ScratchSlot::kActivations, rows * padded_k);
      for (int64_t r = 0; r < rows; ++r) {
        std::memcpy(padded + r * padded_k, x + r * layout_.k, sizeof(float) * layout_.k);
        std::fill(padded + r * padded_k + layout_.k, padded + (r + 1) * padded_k, 0.0f);
      }
      tile.x = padded;
      tile.x_stride = padded_k;
    }
    const int64_t row_bytes = padded_k * static_cast<int64_t>(sizeof(float));
    const Split split = SplitWork(layout_, rows, row_bytes, kLinearFloatRows);
    Run(context, split, rows, tile, kernels_.linear_float);
  }

  void ComputeInt8(const Context& context, const float* x, int64_t rows, LinearTile tile) const {
    const bool per_group = format_ == ActivationFormat::kInt8PerGroup;
    const int64_t padded_k = layout_.padded_k(), groups = layout_.groups();
    const int64_t scales_per_row = per_group ? groups : 1;
    const int64_t row_bytes = padded_k + 4 * (groups + scales_per_row);
    auto* scratch = static_cast<int8_t*>(
        Scratch(ScratchSlot::kActivations, static_cast<size_t>(rows * row_bytes)));
    auto* codes = scratch;  // padded_k is a multiple of 8: what follows is aligned
    auto* sums = reinterpret_cast<int32_t*>(scratch + rows * padded_k);
    auto* scales = reinterpret_cast<float*>(sums + rows * groups);
    context.ParallelFor(rows, rows * layout_.k, [&](int64_t r) {
      kernels_.quantize_row({x + r * layout_.k, layout_.k, padded_k, layout_.group_size, per_group,
                             codes + r * padded_k, sums + r * groups, scales + r * scales_per_row});
    });
    tile.codes = codes;
    tile.sums = sums;
    tile.scales = scales;
    tile.scales_per_row = scales_per_row;
    Run(context, SplitWork(layout_, rows, row_bytes, rows), rows, tile, kernels_.linear_int8);
  }

  void Run(const Context& context, const Split& split, int64_t rows, const LinearTile& whole,
           void (*kernel)(const LinearTile&)) const {
    const int64_t work = layout_.total_bytes() * std::max<int64_t>(rows / 4, 1);
    context.ParallelFor(split.row_panels * split.column_tasks, work, [&](int64_t task) {
      LinearTile tile = whole;
      tile.row_begin = task / split.column_tasks * split.row_panel;
      tile.row_end = std::min(tile.row_begin + split.row_panel, rows);
      tile.block_begin = task % split.column_tasks * split.columns;
      tile.block_end = std::min(tile.block_begin + split.columns, layout_.column_blocks());
      if (tile.x != nullptr)
        tile.scratch = ScratchFloats(ScratchSlot::kWorker, kLinearScratchFloats);
      kernel(tile);
    });
  }

  const PackedLayout layout_;
  const ActivationFormat format_;
  const KernelTable& kernels_;
};

}  // namespace

OperatorSpec QLinearSpec() {
  return {
      "QLinear",
      {{ort::kFloat}, {ort::kUint8}, {ort::kFloat, ort::kOptional}, {ort::kFloat, ort::kOptional}},
      {{ort::kFloat}},
      [](const Attributes& attributes, const KernelTable& kernels) -> std::unique_ptr<Operator> {
        return std::make_unique<QLinear>(attributes, kernels);
      }};
}

}  // namespace qcompile::cpu
