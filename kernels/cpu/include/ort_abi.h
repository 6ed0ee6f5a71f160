// The part of ONNX Runtime's C ABI that this library uses, declared by hand.
//
// ONNX Runtime ships its C headers in no Python wheel, but its ABI is append-only: a slot never
// moves once a version has shipped. So only the slots in use are named here and the rest are
// counted over. `tests/kernels/cpu/check_ort_abi.cc` compares every offset with the real headers
// wherever they are installed.
#ifndef QCOMPILE_CPU_ORT_ABI_H_
#define QCOMPILE_CPU_ORT_ABI_H_

#include <cstddef>
#include <cstdint>

namespace qcompile::cpu::ort {

// ONNX Runtime 1.17: the first with KernelContext_ParallelFor.
constexpr uint32_t kApiVersion = 17;

struct OrtStatus;
struct OrtValue;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtTensorTypeAndShapeInfo;
struct OrtShapeInferContext;
struct OrtCustomOp;

enum ErrorCode : int { kFail = 1, kInvalidArgument = 2 };
enum ElementType : int { kFloat = 1, kUint8 = 2, kInt64 = 7 };
enum Characteristic : int { kRequired = 0, kOptional = 1 };
enum MemoryType : int { kMemoryDefault = 0 };

using UnusedSlot = void (*)();

struct OrtApi {
  OrtStatus* (*CreateStatus)(ErrorCode code, const char* message);
  UnusedSlot unused_1[25];
  OrtStatus* (*CreateCustomOpDomain)(const char* domain, OrtCustomOpDomain** out);
  OrtStatus* (*CustomOpDomain_Add)(OrtCustomOpDomain* domain, const OrtCustomOp* op);
  OrtStatus* (*AddCustomOpDomain)(OrtSessionOptions* options, OrtCustomOpDomain* domain);
  UnusedSlot unused_29[22];
  OrtStatus* (*GetTensorMutableData)(OrtValue* value, void** out);
  UnusedSlot unused_52[8];
  OrtStatus* (*GetTensorElementType)(const OrtTensorTypeAndShapeInfo* info, ElementType* out);
  OrtStatus* (*GetDimensionsCount)(const OrtTensorTypeAndShapeInfo* info, size_t* out);
  OrtStatus* (*GetDimensions)(const OrtTensorTypeAndShapeInfo* info, int64_t* dims, size_t count);
  UnusedSlot unused_63[2];
  OrtStatus* (*GetTensorTypeAndShape)(const OrtValue* value, OrtTensorTypeAndShapeInfo** out);
  UnusedSlot unused_66[19];
  OrtStatus* (*KernelInfoGetAttribute_float)(const OrtKernelInfo* info, const char* name,
                                             float* out);
  OrtStatus* (*KernelInfoGetAttribute_int64)(const OrtKernelInfo* info, const char* name,
                                             int64_t* out);
  OrtStatus* (*KernelInfoGetAttribute_string)(const OrtKernelInfo* info, const char* name,
                                              char* out, size_t* size);
  OrtStatus* (*KernelContext_GetInputCount)(const OrtKernelContext* context, size_t* out);
  OrtStatus* (*KernelContext_GetOutputCount)(const OrtKernelContext* context, size_t* out);
  OrtStatus* (*KernelContext_GetInput)(const OrtKernelContext* context, size_t index,
                                       const OrtValue** out);
  OrtStatus* (*KernelContext_GetOutput)(OrtKernelContext* context, size_t index,
                                        const int64_t* dims, size_t rank, OrtValue** out);
  UnusedSlot unused_92;
  void (*ReleaseStatus)(OrtStatus* status);
  UnusedSlot unused_94[5];
  void (*ReleaseTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo* info);
  UnusedSlot unused_100[144];
  OrtStatus* (*KernelInfo_GetNodeName)(const OrtKernelInfo* info, char* out, size_t* size);
  UnusedSlot unused_245[29];
  OrtStatus* (*KernelContext_ParallelFor)(const OrtKernelContext* context,
                                          void (*fn)(void* user_data, size_t index), size_t total,
                                          size_t num_batch, void* user_data);
};

constexpr size_t kSlot = sizeof(void*);
static_assert(offsetof(OrtApi, CreateCustomOpDomain) == 26 * kSlot);
static_assert(offsetof(OrtApi, GetTensorMutableData) == 51 * kSlot);
static_assert(offsetof(OrtApi, GetTensorElementType) == 60 * kSlot);
static_assert(offsetof(OrtApi, GetTensorTypeAndShape) == 65 * kSlot);
static_assert(offsetof(OrtApi, KernelInfoGetAttribute_float) == 85 * kSlot);
static_assert(offsetof(OrtApi, KernelContext_GetOutput) == 91 * kSlot);
static_assert(offsetof(OrtApi, ReleaseStatus) == 93 * kSlot);
static_assert(offsetof(OrtApi, ReleaseTensorTypeAndShapeInfo) == 99 * kSlot);
static_assert(offsetof(OrtApi, KernelInfo_GetNodeName) == 244 * kSlot);
static_assert(offsetof(OrtApi, KernelContext_ParallelFor) == 274 * kSlot);

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

// A custom operator as version 17 of the API reads it; `version` tells ONNX Runtime where to stop.
struct OrtCustomOp {
  uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info);
  const char* (*GetName)(const OrtCustomOp* op);
  const char* (*GetExecutionProviderType)(const OrtCustomOp* op);
  ElementType (*GetInputType)(const OrtCustomOp* op, size_t index);
  size_t (*GetInputTypeCount)(const OrtCustomOp* op);
  ElementType (*GetOutputType)(const OrtCustomOp* op, size_t index);
  size_t (*GetOutputTypeCount)(const OrtCustomOp* op);
  void (*KernelCompute)(void* kernel, OrtKernelContext* context);
  void (*KernelDestroy)(void* kernel);
  Characteristic (*GetInputCharacteristic)(const OrtCustomOp* op, size_t index);
  Characteristic (*GetOutputCharacteristic)(const OrtCustomOp* op, size_t index);
  MemoryType (*GetInputMemoryType)(const OrtCustomOp* op, size_t index);
  int (*GetVariadicInputMinArity)(const OrtCustomOp* op);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp* op);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp* op);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp* op);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info,
                               void** kernel);
  OrtStatus* (*KernelComputeV2)(void* kernel, OrtKernelContext* context);
  OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp* op, OrtShapeInferContext* context);
  int (*GetStartVersion)(const OrtCustomOp* op);
  int (*GetEndVersion)(const OrtCustomOp* op);
};

}  // namespace qcompile::cpu::ort

#endif  // QCOMPILE_CPU_ORT_ABI_H_
