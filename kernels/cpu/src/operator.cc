#include "operator.h"

#include <atomic>
#include <climits>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>
#include <new>

namespace qcompile::cpu {
namespace {

// Below this much work the threads' wake-up, about 3 us a call, costs more than they save: a thread
// reads 15 to 25 bytes per ns (benchmarks/cpu_linear.py), and two of them save half of that time.
constexpr int64_t kLeastParallelWork = 128 * 1024;

void ThrowIfFailed(const ort::OrtApi& api, ort::OrtStatus* status, const char* what) {
  if (status == nullptr) return;
  api.ReleaseStatus(status);
  Fail("ONNX Runtime refused to give ", what);
}

// An instance of an operator, with the name that its errors carry.
struct Node {
  std::string label;
  const ort::OrtApi* api;
  std::unique_ptr<Operator> op;
};

std::string NodeLabel(const ort::OrtApi& api, const ort::OrtKernelInfo* info, const char* type) {
  std::string label = std::string("com.qcompile.") + type;
  size_t size = 0;
  if (ort::OrtStatus* status = api.KernelInfo_GetNodeName(info, nullptr, &size)) {
    api.ReleaseStatus(status);
    return label;
  }
  std::string name(size, '\0');
  if (ort::OrtStatus* status = api.KernelInfo_GetNodeName(info, name.data(), &size)) {
    api.ReleaseStatus(status);
    return label;
  }
  name.resize(std::strlen(name.c_str()));
  return name.empty() ? label : label + " node '" + name + "'";
}

// Runs `function`; what it throws becomes a status. Nothing may pass the ABI as an exception.
template <class Function>
ort::OrtStatus* Guard(const ort::OrtApi& api, const std::string& label, Function function) {
  try {
    function();
    return nullptr;
  } catch (const OperatorError& error) {
    return api.CreateStatus(ort::kInvalidArgument, (label + ": " + error.what()).c_str());
  } catch (const std::bad_alloc&) {
    return api.CreateStatus(ort::kFail, (label + ": out of memory").c_str());
  } catch (const std::exception& error) {
    return api.CreateStatus(ort::kFail, (label + ": " + error.what()).c_str());
  }
}

const CustomOp& Self(const ort::OrtCustomOp* op) { return *static_cast<const CustomOp*>(op); }

ort::OrtStatus* MakeNode(const ort::OrtCustomOp* op, const ort::OrtApi*,
                         const ort::OrtKernelInfo* info, void** kernel) {
  const CustomOp& self = Self(op);
  const std::string label = NodeLabel(self.api, info, self.spec.name);
  return Guard(self.api, label, [&] {
    auto node = std::make_unique<Node>();
    node->label = label;
    node->api = &self.api;
    node->op = self.spec.make(Attributes(self.api, info), self.kernels);
    *kernel = node.release();
  });
}

ort::OrtStatus* RunNode(void* kernel, ort::OrtKernelContext* context) {
  const Node& node = *static_cast<const Node*>(kernel);
  return Guard(*node.api, node.label, [&] { node.op->Compute(Context(*node.api, context)); });
}

struct ScratchBlock {
  void* data = nullptr;
  size_t bytes = 0;
  ~ScratchBlock() { std::free(data); }
};

// One call of ParallelFor: the first exception of any thread is kept for the caller.
struct ParallelCall {
  const std::function<void(int64_t)>& function;
  std::mutex mutex;
  std::exception_ptr error;

  static void Run(void* self_pointer, size_t index) {
    auto& self = *static_cast<ParallelCall*>(self_pointer);
    try {
      self.function(static_cast<int64_t>(index));
    } catch (...) {
      const std::lock_guard<std::mutex> lock(self.mutex);
      if (!self.error) self.error = std::current_exception();
    }
  }
};

}  // namespace

int64_t Shape::Count() const {
  int64_t count = 1;
  for (int i = 0; i < rank; ++i) count *= dims[i];
  return count;
}

bool Shape::operator==(const Shape& other) const {
  if (rank != other.rank) return false;
  for (int i = 0; i < rank; ++i) {
    if (dims[i] != other.dims[i]) return false;
  }
  return true;
}

std::string Shape::Text() const {
  std::string text = "[";
  for (int i = 0; i < rank; ++i) {
    if (i > 0) text += ", ";
    text += std::to_string(dims[i]);
  }
  return text + "]";
}

int64_t Attributes::Int(const char* name) const {
  int64_t value = 0;
  if (ort::OrtStatus* status = api_.KernelInfoGetAttribute_int64(info_, name, &value)) {
    api_.ReleaseStatus(status);
    Fail("the integer attribute '", name, "' is missing");
  }
  return value;
}

int64_t Attributes::Int(const char* name, int64_t fallback) const {
  int64_t value = 0;
  if (ort::OrtStatus* status = api_.KernelInfoGetAttribute_int64(info_, name, &value)) {
    api_.ReleaseStatus(status);
    return fallback;
  }
  return value;
}

float Attributes::Float(const char* name, float fallback) const {
  float value = 0;
  if (ort::OrtStatus* status = api_.KernelInfoGetAttribute_float(info_, name, &value)) {
    api_.ReleaseStatus(status);
    return fallback;
  }
  return value;
}

std::string Attributes::String(const char* name, const char* fallback) const {
  size_t size = 0;
  if (ort::OrtStatus* status = api_.KernelInfoGetAttribute_string(info_, name, nullptr, &size)) {
    api_.ReleaseStatus(status);
    return fallback;
  }
  std::string value(size, '\0');
  ThrowIfFailed(api_, api_.KernelInfoGetAttribute_string(info_, name, value.data(), &size), name);
  value.resize(std::strlen(value.c_str()));
  return value;
}

const void* Context::InputData(size_t index, ort::ElementType type, Shape* shape) const {
  size_t count = 0;
  ThrowIfFailed(api_, api_.KernelContext_GetInputCount(context_, &count), "the number of inputs");
  if (index >= count) return nullptr;
  const ort::OrtValue* value = nullptr;
  ThrowIfFailed(api_, api_.KernelContext_GetInput(context_, index, &value), "an input");
  if (value == nullptr) return nullptr;

  ort::OrtTensorTypeAndShapeInfo* info = nullptr;
  ThrowIfFailed(api_, api_.GetTensorTypeAndShape(value, &info), "an input's shape");
  const auto release = [this](ort::OrtTensorTypeAndShapeInfo* p) {
    api_.ReleaseTensorTypeAndShapeInfo(p);
  };
  const std::unique_ptr<ort::OrtTensorTypeAndShapeInfo, decltype(release)> owner(info, release);
  ort::ElementType actual = type;
  ThrowIfFailed(api_, api_.GetTensorElementType(info, &actual), "an input's element type");
  Require(actual == type, "input ", static_cast<int64_t>(index), " has element type ",
          static_cast<int>(actual), " instead of ", static_cast<int>(type));
  size_t rank = 0;
  ThrowIfFailed(api_, api_.GetDimensionsCount(info, &rank), "an input's rank");
  Require(rank <= kMaxRank, "input ", static_cast<int64_t>(index), " has rank ",
          static_cast<int64_t>(rank), "; at most ", kMaxRank, " is supported");
  shape->rank = static_cast<int>(rank);
  ThrowIfFailed(api_, api_.GetDimensions(info, shape->dims, rank), "an input's dimensions");
  void* data = nullptr;
  // The one accessor of version 17; the data is only read.
  ThrowIfFailed(api_, api_.GetTensorMutableData(const_cast<ort::OrtValue*>(value), &data),
                "an input's data");
  // An empty tensor may have no memory at all, and null means absent here.
  static const int64_t kNothing = 0;
  return data != nullptr ? data : &kNothing;
}

void* Context::OutputData(size_t index, const Shape& shape) const {
  size_t count = 0;
  ThrowIfFailed(api_, api_.KernelContext_GetOutputCount(context_, &count), "the output count");
  if (index >= count) return nullptr;
  ort::OrtValue* value = nullptr;
  ThrowIfFailed(
      api_,
      api_.KernelContext_GetOutput(context_, index, shape.dims, static_cast<size_t>(shape.rank),
                                   &value),
      "an output (does the buffer that is bound to it have the shape that the node computes?)");
  if (value == nullptr) return nullptr;
  void* data = nullptr;
  ThrowIfFailed(api_, api_.GetTensorMutableData(value, &data), "an output's data");
  static float nothing = 0;
  return data != nullptr ? data : &nothing;
}

Tensor<float> Context::Output(size_t index, const Shape& shape) const {
  return {static_cast<float*>(OutputData(index, shape)), shape};
}

Tensor<uint8_t> Context::OutputBytes(size_t index, const Shape& shape) const {
  return {static_cast<uint8_t*>(OutputData(index, shape)), shape};
}

void Context::ParallelFor(int64_t total, int64_t work,
                          const std::function<void(int64_t)>& function) const {
  if (total <= 1 || work < kLeastParallelWork) {
    for (int64_t i = 0; i < total; ++i) function(i);
    return;
  }
  ParallelCall call{function, {}, nullptr};
  ThrowIfFailed(api_,
                api_.KernelContext_ParallelFor(context_, ParallelCall::Run,
                                               static_cast<size_t>(total), 0, &call),
                "its threads");
  if (call.error) std::rethrow_exception(call.error);
}

void* Scratch(ScratchSlot slot, size_t bytes) {
  thread_local ScratchBlock blocks[static_cast<int>(ScratchSlot::kCount)];
  ScratchBlock& block = blocks[static_cast<int>(slot)];
  if (block.bytes < bytes || block.data == nullptr) {
    std::free(block.data);
    block.bytes = (bytes + 4095) / 4096 * 4096 + 4096;
    block.data = std::aligned_alloc(64, block.bytes);
    if (block.data == nullptr) {
      block.bytes = 0;
      throw std::bad_alloc();
    }
  }
  return block.data;
}

CustomOp::CustomOp(OperatorSpec op_spec, const KernelTable& table, const ort::OrtApi& ort_api)
    : OrtCustomOp{}, spec(std::move(op_spec)), kernels(table), api(ort_api) {
  version = ort::kApiVersion;
  GetName = [](const OrtCustomOp* op) { return Self(op).spec.name; };
  GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };  // the CPU
  GetInputTypeCount = [](const OrtCustomOp* op) { return Self(op).spec.inputs.size(); };
  GetOutputTypeCount = [](const OrtCustomOp* op) { return Self(op).spec.outputs.size(); };
  GetInputType = [](const OrtCustomOp* op, size_t i) { return Self(op).spec.inputs[i].type; };
  GetOutputType = [](const OrtCustomOp* op, size_t i) { return Self(op).spec.outputs[i].type; };
  GetInputCharacteristic = [](const OrtCustomOp* op, size_t i) {
    return Self(op).spec.inputs[i].characteristic;
  };
  GetOutputCharacteristic = [](const OrtCustomOp* op, size_t i) {
    return Self(op).spec.outputs[i].characteristic;
  };
  GetInputMemoryType = [](const OrtCustomOp*, size_t) { return ort::kMemoryDefault; };
  GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
  GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 1; };
  GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
  GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
  CreateKernelV2 = MakeNode;
  KernelComputeV2 = RunNode;
  KernelDestroy = [](void* kernel) { delete static_cast<Node*>(kernel); };
  GetStartVersion = [](const OrtCustomOp*) { return 1; };
  GetEndVersion = [](const OrtCustomOp*) { return INT_MAX; };
}

}  // namespace qcompile::cpu
