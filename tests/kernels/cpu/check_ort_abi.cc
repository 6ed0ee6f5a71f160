// Compiles only if ort_abi.h agrees with ONNX Runtime's own header. Nothing here is run.
#include <onnxruntime_c_api.h>

#include "ort_abi.h"

namespace ours = qcompile::cpu::ort;

#define SAME_SLOT(type, name)                                         \
  static_assert(offsetof(::type, name) == offsetof(ours::type, name), \
                #type "::" #name " is at another offset in ONNX Runtime")

SAME_SLOT(OrtApiBase, GetApi);
SAME_SLOT(OrtApiBase, GetVersionString);

SAME_SLOT(OrtApi, CreateStatus);
SAME_SLOT(OrtApi, CreateCustomOpDomain);
SAME_SLOT(OrtApi, CustomOpDomain_Add);
SAME_SLOT(OrtApi, AddCustomOpDomain);
SAME_SLOT(OrtApi, GetTensorMutableData);
SAME_SLOT(OrtApi, GetTensorElementType);
SAME_SLOT(OrtApi, GetDimensionsCount);
SAME_SLOT(OrtApi, GetDimensions);
SAME_SLOT(OrtApi, GetTensorTypeAndShape);
SAME_SLOT(OrtApi, KernelInfoGetAttribute_float);
SAME_SLOT(OrtApi, KernelInfoGetAttribute_int64);
SAME_SLOT(OrtApi, KernelInfoGetAttribute_string);
SAME_SLOT(OrtApi, KernelContext_GetInputCount);
SAME_SLOT(OrtApi, KernelContext_GetOutputCount);
SAME_SLOT(OrtApi, KernelContext_GetInput);
SAME_SLOT(OrtApi, KernelContext_GetOutput);
SAME_SLOT(OrtApi, ReleaseStatus);
SAME_SLOT(OrtApi, ReleaseTensorTypeAndShapeInfo);
SAME_SLOT(OrtApi, KernelInfo_GetNodeName);
SAME_SLOT(OrtApi, KernelContext_ParallelFor);

SAME_SLOT(OrtCustomOp, version);
SAME_SLOT(OrtCustomOp, CreateKernel);
SAME_SLOT(OrtCustomOp, GetName);
SAME_SLOT(OrtCustomOp, GetExecutionProviderType);
SAME_SLOT(OrtCustomOp, GetInputType);
SAME_SLOT(OrtCustomOp, GetInputTypeCount);
SAME_SLOT(OrtCustomOp, GetOutputType);
SAME_SLOT(OrtCustomOp, GetOutputTypeCount);
SAME_SLOT(OrtCustomOp, KernelCompute);
SAME_SLOT(OrtCustomOp, KernelDestroy);
SAME_SLOT(OrtCustomOp, GetInputCharacteristic);
SAME_SLOT(OrtCustomOp, GetOutputCharacteristic);
SAME_SLOT(OrtCustomOp, GetInputMemoryType);
SAME_SLOT(OrtCustomOp, GetVariadicInputMinArity);
SAME_SLOT(OrtCustomOp, GetVariadicInputHomogeneity);
SAME_SLOT(OrtCustomOp, GetVariadicOutputMinArity);
SAME_SLOT(OrtCustomOp, GetVariadicOutputHomogeneity);
SAME_SLOT(OrtCustomOp, CreateKernelV2);
SAME_SLOT(OrtCustomOp, KernelComputeV2);
SAME_SLOT(OrtCustomOp, InferOutputShapeFn);
SAME_SLOT(OrtCustomOp, GetStartVersion);
SAME_SLOT(OrtCustomOp, GetEndVersion);

static_assert(ORT_API_VERSION >= ours::kApiVersion);
static_assert(int{ORT_FAIL} == ours::kFail && int{ORT_INVALID_ARGUMENT} == ours::kInvalidArgument);
static_assert(int{ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT} == ours::kFloat);
static_assert(int{ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8} == ours::kUint8);
static_assert(int{ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64} == ours::kInt64);
static_assert(int{INPUT_OUTPUT_REQUIRED} == ours::kRequired);
static_assert(int{INPUT_OUTPUT_OPTIONAL} == ours::kOptional);
static_assert(int{OrtMemTypeDefault} == ours::kMemoryDefault);
