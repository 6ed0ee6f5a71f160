// What an operator sees of ONNX Runtime: attributes when it is made, tensors and threads when it
// runs.
//
// Errors are thrown as OperatorError and become an OrtStatus at the ABI's edge (operator.cc), where
// the node's name is put in front.
#ifndef QCOMPILE_CPU_OPERATOR_H_
#define QCOMPILE_CPU_OPERATOR_H_

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernel_table.h"
#include "ort_abi.h"

namespace qcompile::cpu {

class OperatorError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Throws what `parts` say, joined, unless `condition` holds.
template <class... Parts>
[[noreturn]] void Fail(const Parts&... parts);
template <class... Parts>
void Require(bool condition, const Parts&... parts);

class Attributes {
 public:
  Attributes(const ort::OrtApi& api, const ort::OrtKernelInfo* info) : api_(api), info_(info) {}

  int64_t Int(const char* name) const;
  int64_t Int(const char* name, int64_t fallback) const;
  float Float(const char* name, float fallback) const;
  std::string String(const char* name, const char* fallback) const;

 private:
  const ort::OrtApi& api_;
  const ort::OrtKernelInfo* info_;
};

constexpr int kMaxRank = 8;

struct Shape {
  int64_t dims[kMaxRank];
  int rank;

  int64_t operator[](int axis) const { return dims[axis < 0 ? axis + rank : axis]; }
  int64_t Count() const;
  bool operator==(const Shape& other) const;
  std::string Text() const;
};

// A tensor that ONNX Runtime owns. `data` is null for an optional input that is absent.
template <class T>
struct Tensor {
  T* data = nullptr;
  Shape shape = {{}, 0};

  explicit operator bool() const { return data != nullptr; }
};

class Context {
 public:
  Context(const ort::OrtApi& api, ort::OrtKernelContext* context) : api_(api), context_(context) {}

  // A required or optional input; its element type was declared, and is checked, by the operator.
  template <class T>
  Tensor<const T> Input(size_t index) const;
  // A required or optional output; absent ones give a null tensor.
  Tensor<float> Output(size_t index, const Shape& shape) const;
  Tensor<uint8_t> OutputBytes(size_t index, const Shape& shape) const;

  // Calls function(i) for every i < total on the session's threads, in no order. `work` is a rough
  // cost in bytes touched or operations: below a few microseconds the calling thread does it all.
  void ParallelFor(int64_t total, int64_t work, const std::function<void(int64_t)>& function) const;

 private:
  const void* InputData(size_t index, ort::ElementType type, Shape* shape) const;
  void* OutputData(size_t index, const Shape& shape) const;

  const ort::OrtApi& api_;
  ort::OrtKernelContext* context_;
};

// A memory block of this thread that grows and is reused from call to call; 64-byte aligned.
// Each slot is a different block. Contents are unspecified.
enum class ScratchSlot : int {
  kActivations,
  kPanels,
  kGate,
  kKeys,
  kMask,
  kParts,
  kKeyPanels,
  kValues,
  kExperts,
  kWorker,
  kCount
};
void* Scratch(ScratchSlot slot, size_t bytes);
inline float* ScratchFloats(ScratchSlot slot, int64_t count) {
  return static_cast<float*>(Scratch(slot, sizeof(float) * static_cast<size_t>(count)));
}

class Operator {
 public:
  virtual ~Operator() = default;
  virtual void Compute(const Context& context) const = 0;
};

struct TensorSpec {
  ort::ElementType type;
  ort::Characteristic characteristic = ort::kRequired;
};

struct OperatorSpec {
  const char* name;
  std::vector<TensorSpec> inputs;
  std::vector<TensorSpec> outputs;
  std::unique_ptr<Operator> (*make)(const Attributes& attributes, const KernelTable& kernels);
};

OperatorSpec QLinearSpec();
OperatorSpec QLinearsSpec();
OperatorSpec QGatedLinearSpec();
OperatorSpec QEmbeddingSpec();
OperatorSpec QExpertsSpec();
OperatorSpec AttentionSpec();
OperatorSpec QAttentionSpec();
OperatorSpec RmsNormSpec();
OperatorSpec GatedActivationSpec();
OperatorSpec HadamardSpec();
OperatorSpec VectorLinearSpec();
OperatorSpec SparseLinearSpec();

// An operator of one instruction set in the form that ONNX Runtime takes.
struct CustomOp : ort::OrtCustomOp {
  CustomOp(OperatorSpec spec, const KernelTable& kernels, const ort::OrtApi& api);

  OperatorSpec spec;
  const KernelTable& kernels;
  const ort::OrtApi& api;
};

// The table that this machine, and the environment variable QCOMPILE_CPU_ISA, ask for.
const KernelTable& SelectKernels();

// --- details ---

inline void AppendText(std::string* out, const char* text) { *out += text; }
inline void AppendText(std::string* out, const std::string& text) { *out += text; }
inline void AppendText(std::string* out, const Shape& shape) { *out += shape.Text(); }
inline void AppendText(std::string* out, int64_t value) { *out += std::to_string(value); }
inline void AppendText(std::string* out, int value) { *out += std::to_string(value); }

template <class... Parts>
[[noreturn]] void Fail(const Parts&... parts) {
  std::string message;
  (AppendText(&message, parts), ...);
  throw OperatorError(message);
}

template <class... Parts>
void Require(bool condition, const Parts&... parts) {
  if (!condition) Fail(parts...);
}

template <>
inline Tensor<const float> Context::Input(size_t index) const {
  Tensor<const float> t;
  t.data = static_cast<const float*>(InputData(index, ort::kFloat, &t.shape));
  return t;
}
template <>
inline Tensor<const uint8_t> Context::Input(size_t index) const {
  Tensor<const uint8_t> t;
  t.data = static_cast<const uint8_t*>(InputData(index, ort::kUint8, &t.shape));
  return t;
}
template <>
inline Tensor<const int64_t> Context::Input(size_t index) const {
  Tensor<const int64_t> t;
  t.data = static_cast<const int64_t*>(InputData(index, ort::kInt64, &t.shape));
  return t;
}

}  // namespace qcompile::cpu

#endif  // QCOMPILE_CPU_OPERATOR_H_
