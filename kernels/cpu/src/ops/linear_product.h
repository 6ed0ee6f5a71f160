// Products of one input with packed weights: what QLinear, QLinears and QGatedLinear share.
//
// The input is normed if it is to be, rounded once, and read by all layers. The work is cut into
// tiles of rows and columns; neither the cut nor the number of threads changes a result.
#ifndef QCOMPILE_CPU_OPS_LINEAR_PRODUCT_H_
#define QCOMPILE_CPU_OPS_LINEAR_PRODUCT_H_

#include "huge_pages.h"
#include "packed_weight.h"

namespace qcompile::cpu {

// How activations are rounded first: not at all, by scales that are measured per token or per group
// of the weight, or by a stored scale for all, and a zero point if they have no sign.
enum class ActivationScales { kFloat, kPerToken, kPerGroup, kStatic, kStaticUnsigned };

struct ActivationFormat {
  ActivationScales scales;
  int bits;  // of the codes, 2 to 8; all are multiplied as bytes

  bool is_float() const { return scales == ActivationScales::kFloat; }
  bool is_static() const {
    return scales == ActivationScales::kStatic || scales == ActivationScales::kStaticUnsigned;
  }
  int32_t largest_signed() const { return (1 << (bits - 1)) - 1; }
};

// The attribute `act`: "float", or "int8_token", "int4_group", "int8_static", "uint4_static" and so
// on.
ActivationFormat ReadActivationFormat(const Attributes& attributes);

// The input [2] that says how activations of a static format are rounded: their scale, and the code
// of 0. Codes with a zero point are moved by half of their range, to int8; that the products then
// lack the zero point is made up for in the bias. Other formats have no such input.
StaticGrid ReadGrid(const Context& context, size_t index, ActivationFormat format);

// Throws unless a weight can be multiplied with activations of a format.
void RequireProduct(const PackedLayout& layout, ActivationFormat format);

// The input of a product: rows of k floats, and the RMS norm that comes first.
struct LinearInput {
  const float* x = nullptr;
  int64_t rows = 0;
  bool normed = false;
  const float* norm_weight = nullptr;  // [k] or null
  float epsilon = 0.0f;
  StaticGrid grid = {};  // of static formats
};

struct LinearLayer {
  const PackedLayout* layout;
  const uint8_t* weight;
  const float* bias;      // [n] or null
  const float* residual;  // [rows, n] or null
  float* y;               // [rows, n]
};

// A weight that every call reads from end to end.
inline const uint8_t* StreamedWeight(const Tensor<const uint8_t>& weight,
                                     const PackedLayout& layout, const HugePages& pages) {
  const uint8_t* data = CheckedWeight(weight, layout);
  pages.Want(data, static_cast<size_t>(layout.total_bytes()));
  return data;
}

class LinearProduct {
 public:
  LinearProduct(const Context& context, const KernelTable& kernels, ActivationFormat format)
      : context_(context), kernels_(kernels), format_(format) {}

  // y = x . weight^T + bias + residual for every layer. They have the same k, and with int8
  // activations the same group size.
  void Run(const LinearInput& input, const LinearLayer* layers, int64_t count) const;

  // y = activation(x . gate^T + bias) * (x . up^T + bias), to `up.y`; gate.y is not used.
  void RunGated(const LinearInput& input, const LinearLayer& gate, const LinearLayer& up,
                Activation activation) const;

 private:
  struct Split;

  // The kernels that a number of rows goes through in panels; null if it does not.
  const PanelKernels* Panels(int64_t rows) const;
  LinearTile Prepare(const LinearInput& input, const PackedLayout& layout) const;
  LinearTile PrepareFloat(const LinearInput& input, const PackedLayout& layout) const;
  LinearTile PrepareIntegers(const LinearInput& input, const PackedLayout& layout) const;
  // Makes all rows, and panels of them if they go that way.
  template <class MakeRow>
  LinearTile PackPanels(LinearTile tile, const LinearInput& input, MakeRow make_row) const;
  Split SplitWork(const PackedLayout& layout, int64_t rows) const;
  void RunTile(const Split& split, int64_t task, const LinearLayer& layer, LinearTile* tile) const;

  const Context& context_;
  const KernelTable& kernels_;
  const ActivationFormat format_;
};

}  // namespace qcompile::cpu

#endif  // QCOMPILE_CPU_OPS_LINEAR_PRODUCT_H_
