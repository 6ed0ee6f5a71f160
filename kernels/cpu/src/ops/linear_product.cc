#include "linear_product.h"

#include <algorithm>
#include <cstring>

namespace qcompile::cpu {
namespace {

// The row of x that is multiplied: x itself, or its norm in `buffer`.
const float* NormedRow(const KernelTable& kernels, const LinearInput& input, int64_t k, int64_t row,
                       float* buffer) {
  const float* x = input.x + row * k;
  if (!input.normed) return x;
  kernels.rms_norm(x, input.norm_weight, buffer, k, input.epsilon);
  return buffer;
}

}  // namespace

ActivationFormat ReadActivationFormat(const Attributes& attributes) {
  const std::string act = attributes.String("act", "float");
  if (act == "float") return {ActivationScales::kFloat, 0};
  for (int bits = 2; bits <= 8; ++bits) {
    const std::string codes = "int" + std::to_string(bits);
    if (act == codes + "_token") return {ActivationScales::kPerToken, bits};
    if (act == codes + "_group") return {ActivationScales::kPerGroup, bits};
    if (act == codes + "_static") return {ActivationScales::kStatic, bits};
    if (act == "u" + codes + "_static") return {ActivationScales::kStaticUnsigned, bits};
  }
  Fail("act = '", act,
       "' is none of 'float', 'int8_token', 'int8_group', 'int8_static', 'uint8_static', or these "
       "with 2 to 7 bits");
}

StaticGrid ReadGrid(const Context& context, size_t index, ActivationFormat format) {
  const auto numbers = context.Input<float>(index);
  Require(bool{numbers} == format.is_static(),
          "a grid is given to static activations, and only to them");
  if (!format.is_static()) return {};
  Require(numbers.shape.rank == 1 && numbers.shape[0] == 2, "the grid has shape ", numbers.shape,
          " instead of [2]");
  const float scale = numbers.data[0], zero = numbers.data[1];
  if (format.scales == ActivationScales::kStatic) {
    const auto largest = static_cast<float>(format.largest_signed());
    return {scale, -largest, largest, 0};
  }
  const auto most = static_cast<float>((1 << format.bits) - 1);
  Require(zero >= 0.0f && zero <= most, "the zero point of the grid is no code");
  return {scale, -zero, most - zero, static_cast<int32_t>(zero) - (1 << (format.bits - 1))};
}

void RequireProduct(const PackedLayout& layout, ActivationFormat format) {
  if (format.is_float()) return;
  // 255 * 128 * 65536 is the largest dot product that int32 holds.
  constexpr int64_t kLongestGroup = 65536;
  Require(layout.group_size <= kLongestGroup, "int8 activations need groups of at most ",
          kLongestGroup, " along K, not ", layout.group_size);
  Require(layout.coding != Coding::kTable && layout.coding != Coding::kE4m3,
          "int8 activations need a weight of whole numbers: the coding is neither 'integer', "
          "'e2m1' nor 'ternary'");
}

// How a product is cut: rows so that their activations stay in the second-level cache, columns so
// that a piece is some tens of kilobytes of weights.
struct LinearProduct::Split {
  int64_t rows, row_panel, row_panels;
  int64_t columns, column_tasks;

  int64_t tasks() const { return row_panels * column_tasks; }
};

LinearProduct::Split LinearProduct::SplitWork(const PackedLayout& layout, int64_t rows) const {
  constexpr int64_t kPanelBytes = 512 * 1024;
  constexpr int64_t kTaskBytes = 32 * 1024;
  constexpr int64_t kBlockMultiple = 4;  // a whole number of passes for every kernel
  const bool is_float = format_.is_float();
  const PanelKernels* panels = Panels(rows);
  int64_t multiple = 24, most = is_float ? kLinearFloatRows : rows;  // 8 rows go together, or 4
  if (panels != nullptr) {
    const bool any = panels->most_rows == 0;
    multiple = any ? 2 * panels->rows : panels->most_rows;
    most = any ? rows : panels->most_rows;
  }
  const int64_t row_bytes = layout.padded_k() * (is_float ? int64_t{sizeof(float)} : 1);
  const int64_t fit = std::max(kPanelBytes / row_bytes / multiple * multiple, multiple);
  Split split;
  split.rows = rows;
  split.row_panel = std::min({rows, fit, most});
  split.row_panels = (rows + split.row_panel - 1) / split.row_panel;
  const int64_t task_bytes = layout.column_block_bytes() * split.row_panel;
  const int64_t blocks = std::max<int64_t>(kTaskBytes / task_bytes, 1);
  split.columns = (blocks + kBlockMultiple - 1) / kBlockMultiple * kBlockMultiple;
  split.column_tasks = (layout.column_blocks() + split.columns - 1) / split.columns;
  return split;
}

const PanelKernels* LinearProduct::Panels(int64_t rows) const {
  const PanelKernels* panels = format_.is_float() ? kernels_.float_panels : kernels_.panels;
  return panels != nullptr && rows >= panels->least_rows ? panels : nullptr;
}

LinearTile LinearProduct::Prepare(const LinearInput& input, const PackedLayout& layout) const {
  return format_.is_float() ? PrepareFloat(input, layout) : PrepareIntegers(input, layout);
}

LinearTile LinearProduct::PrepareFloat(const LinearInput& input, const PackedLayout& layout) const {
  const int64_t k = layout.k, padded_k = layout.padded_k();
  LinearTile tile = {};
  tile.layout = &layout;
  tile.x = input.x;
  tile.x_stride = k;
  if (padded_k == k && !input.normed) {
    return Panels(input.rows) == nullptr ? tile : PackPanels(tile, input, [](int64_t) {});
  }
  float* rows = ScratchFloats(ScratchSlot::kActivations, input.rows * padded_k);
  tile.x = rows;
  tile.x_stride = padded_k;
  return PackPanels(tile, input, [&](int64_t r) {
    float* to = rows + r * padded_k;
    const float* from = NormedRow(kernels_, input, k, r, to);
    if (from != to) std::memcpy(to, from, sizeof(float) * static_cast<size_t>(k));
    std::fill(to + k, to + padded_k, 0.0f);
  });
}

LinearTile LinearProduct::PrepareIntegers(const LinearInput& input,
                                          const PackedLayout& layout) const {
  const bool per_group = format_.scales == ActivationScales::kPerGroup;
  const StaticGrid* grid = format_.is_static() ? &input.grid : nullptr;
  const int64_t k = layout.k, padded_k = layout.padded_k(), groups = layout.groups();
  const int64_t scales_per_row = per_group ? groups : 1;
  const int64_t row_bytes = padded_k + 4 * (groups + scales_per_row);
  auto* codes = static_cast<int8_t*>(
      Scratch(ScratchSlot::kActivations, static_cast<size_t>(input.rows * row_bytes)));
  // padded_k is a multiple of 8: what follows is aligned.
  auto* sums = reinterpret_cast<int32_t*>(codes + input.rows * padded_k);
  auto* scales = reinterpret_cast<float*>(sums + input.rows * groups);
  LinearTile tile = {};
  tile.layout = &layout;
  tile.codes = codes;
  tile.sums = sums;
  tile.scales = scales;
  tile.scales_per_row = scales_per_row;
  const auto quantize = [&](int64_t r) {
    float* buffer = input.normed ? ScratchFloats(ScratchSlot::kWorker, k) : nullptr;
    kernels_.quantize_row({NormedRow(kernels_, input, k, r, buffer), k, padded_k, layout.group_size,
                           per_group, grid, format_.largest_signed(), codes + r * padded_k,
                           sums + r * groups, scales + r * scales_per_row});
  };
  return PackPanels(tile, input, quantize);
}

template <class MakeRow>
LinearTile LinearProduct::PackPanels(LinearTile tile, const LinearInput& input,
                                     MakeRow make_row) const {
  const PanelKernels* panels = Panels(input.rows);
  const int64_t work = input.rows * tile.layout->k;
  if (panels == nullptr) {
    context_.ParallelFor(input.rows, work, make_row);
    return tile;
  }
  const int64_t panel_bytes = panels->panel_bytes(*tile.layout, tile.scales_per_row);
  const int64_t count = (input.rows + panels->rows - 1) / panels->rows;
  auto* packed = static_cast<uint8_t*>(
      Scratch(ScratchSlot::kPanels, static_cast<size_t>(count * panel_bytes)));
  tile.panels = packed;
  context_.ParallelFor(count, work, [&](int64_t panel) {
    LinearTile rows = tile;
    rows.row_begin = panel * panels->rows;
    rows.row_end = std::min(rows.row_begin + panels->rows, input.rows);
    for (int64_t r = rows.row_begin; r < rows.row_end; ++r) make_row(r);
    panels->pack(rows, packed + panel * panel_bytes);
  });
  return tile;
}

// Task `task` of a layer. `tile` has the activations; it is left as the kernel was given it.
void LinearProduct::RunTile(const Split& split, int64_t task, const LinearLayer& layer,
                            LinearTile* tile) const {
  tile->layout = layer.layout;
  tile->weight = layer.weight;
  tile->bias = layer.bias;
  tile->residual = layer.residual;
  tile->y = layer.y;
  tile->row_begin = task / split.column_tasks * split.row_panel;
  tile->row_end = std::min(tile->row_begin + split.row_panel, split.rows);
  tile->block_begin = task % split.column_tasks * split.columns;
  tile->block_end = std::min(tile->block_begin + split.columns, layer.layout->column_blocks());
  if (tile->panels != nullptr) {
    const PanelKernels& panels = *Panels(split.rows);
    const auto bytes = static_cast<size_t>(panels.scratch_bytes(*layer.layout));
    tile->scratch = static_cast<float*>(Scratch(ScratchSlot::kWorker, bytes));
    panels.multiply(*tile);
  } else if (tile->x != nullptr) {
    tile->scratch = ScratchFloats(ScratchSlot::kWorker, kLinearScratchFloats);
    kernels_.linear_float(*tile);
  } else {
    kernels_.linear_int8(*tile);
  }
}

void LinearProduct::Run(const LinearInput& input, const LinearLayer* layers, int64_t count) const {
  if (input.rows == 0) return;
  const LinearTile activations = Prepare(input, *layers[0].layout);
  int64_t tasks = 0, bytes = 0;
  for (int64_t i = 0; i < count; ++i) {
    tasks += SplitWork(*layers[i].layout, input.rows).tasks();
    bytes += layers[i].layout->total_bytes();
  }
  const int64_t work = bytes * std::max<int64_t>(input.rows / 4, 1);
  context_.ParallelFor(tasks, work, [&](int64_t task) {
    const LinearLayer* layer = layers;
    Split split = SplitWork(*layer->layout, input.rows);
    while (task >= split.tasks()) {
      task -= split.tasks();
      split = SplitWork(*(++layer)->layout, input.rows);
    }
    LinearTile tile = activations;
    RunTile(split, task, *layer, &tile);
  });
}

void LinearProduct::RunGated(const LinearInput& input, const LinearLayer& gate,
                             const LinearLayer& up, Activation activation) const {
  if (input.rows == 0) return;
  const LinearTile activations = Prepare(input, *gate.layout);
  const int64_t n = up.layout->n;
  LinearLayer to_scratch = gate;
  to_scratch.y = ScratchFloats(ScratchSlot::kGate, input.rows * n);
  const Split split = SplitWork(*up.layout, input.rows);
  const int64_t bytes = gate.layout->total_bytes() + up.layout->total_bytes();
  const int64_t work = bytes * std::max<int64_t>(input.rows / 4, 1);
  context_.ParallelFor(split.tasks(), work, [&](int64_t task) {
    LinearTile tile = activations;
    RunTile(split, task, to_scratch, &tile);
    RunTile(split, task, up, &tile);
    const int64_t column = tile.block_begin * kColumns;
    const int64_t columns = std::min(tile.block_end * kColumns, n) - column;
    for (int64_t r = tile.row_begin; r < tile.row_end; ++r) {
      const int64_t at = r * n + column;
      kernels_.gated_activation(activation, to_scratch.y + at, up.y + at, up.y + at, columns);
    }
  });
}

}  // namespace qcompile::cpu
