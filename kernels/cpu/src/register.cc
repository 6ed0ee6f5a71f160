// The one exported symbol: ONNX Runtime calls it when a session registers this library.
#include <map>
#include <memory>
#include <mutex>

#include "operator.h"

namespace qcompile::cpu {
namespace {

// The operators of one instruction set. Sessions point into it, so it is never destroyed.
struct Library {
  std::vector<std::unique_ptr<CustomOp>> ops;
  ort::OrtCustomOpDomain* domain = nullptr;
};

ort::OrtStatus* MakeLibrary(const ort::OrtApi& api, const KernelTable& kernels, Library* library) {
  if (ort::OrtStatus* status = api.CreateCustomOpDomain("com.qcompile", &library->domain)) {
    return status;
  }
  for (OperatorSpec (*spec)() : {QLinearSpec, QLinearsSpec, QGatedLinearSpec, QEmbeddingSpec,
                                 AttentionSpec, QAttentionSpec, RmsNormSpec, GatedActivationSpec,
                                 HadamardSpec, VectorLinearSpec, SparseLinearSpec, QExpertsSpec}) {
    library->ops.push_back(std::make_unique<CustomOp>(spec(), kernels, api));
    if (ort::OrtStatus* status =
            api.CustomOpDomain_Add(library->domain, library->ops.back().get())) {
      return status;
    }
  }
  return nullptr;
}

ort::OrtStatus* Register(ort::OrtSessionOptions* options, const ort::OrtApi& api) {
  static std::mutex mutex;
  static auto* libraries = new std::map<const KernelTable*, Library*>;

  const KernelTable& kernels = SelectKernels();
  const std::lock_guard<std::mutex> lock(mutex);
  Library*& library = (*libraries)[&kernels];
  if (library == nullptr) {
    auto made = std::make_unique<Library>();
    if (ort::OrtStatus* status = MakeLibrary(api, kernels, made.get())) return status;
    library = made.release();
  }
  return api.AddCustomOpDomain(options, library->domain);
}

}  // namespace
}  // namespace qcompile::cpu

extern "C" __attribute__((visibility("default"))) qcompile::cpu::ort::OrtStatus* RegisterCustomOps(
    qcompile::cpu::ort::OrtSessionOptions* options, const qcompile::cpu::ort::OrtApiBase* base) {
  namespace ort = qcompile::cpu::ort;
  const ort::OrtApi* api = base->GetApi(ort::kApiVersion);
  if (api == nullptr) {
    // Version 1 is in every ONNX Runtime, and has what it takes to say so.
    const std::string message = std::string("qcompile's CPU kernels need ONNX Runtime 1.17 or ") +
                                "newer; this is " + base->GetVersionString();
    return base->GetApi(1)->CreateStatus(ort::kFail, message.c_str());
  }
  try {
    return qcompile::cpu::Register(options, *api);
  } catch (const std::exception& error) {
    return api->CreateStatus(ort::kFail, error.what());
  }
}
