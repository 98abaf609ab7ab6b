#include "tensorrt/plugin.h"

#include <cstdio>
#include <cstring>
#include <new>

namespace vtexport::trt {
namespace {

using nvinfer1::DataType;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

constexpr int32_t kFailed = 1;

nvinfer1::ILoggerFinder* g_logger_finder = nullptr;

void log_error(const Op& op, const char* what) noexcept {
  nvinfer1::ILogger* logger = g_logger_finder == nullptr ? nullptr : g_logger_finder->findLogger();
  if (logger == nullptr) return;
  char line[256];
  std::snprintf(line, sizeof line, "vtexport::%s: %s", op.name, what);
  logger->log(nvinfer1::ILogger::Severity::kERROR, line);
}

DataType data_type(Kind kind, DataType element) {
  switch (kind) {
    case Kind::kElement:
      return element;
    case Kind::kFloat32:
      return DataType::kFLOAT;
    case Kind::kInt32:
      return DataType::kINT32;
    case Kind::kInt64:
      return DataType::kINT64;
  }
  return element;
}

bool aligned(const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

bool is_empty(const nvinfer1::Dims& dims) {
  for (int d = 0; d < dims.nbDims; ++d) {
    if (dims.d[d] == 0) return true;
  }
  return false;
}

}  // namespace

const char* read_fields(const Op& op, const nvinfer1::PluginFieldCollection* fields, Values& values) noexcept {
  for (int a = 0; a < op.attributes; ++a) {
    const PluginField* found = nullptr;
    for (int32_t f = 0; fields != nullptr && f < fields->nbFields; ++f) {
      const PluginField& field = fields->fields[f];
      if (field.name != nullptr && std::strcmp(field.name, op.attribute[a].name) == 0) found = &field;
    }
    if (found == nullptr || found->data == nullptr || found->length != 1) return op.attribute[a].name;
    if (op.attribute[a].is_float) {
      if (found->type != PluginFieldType::kFLOAT32) return op.attribute[a].name;
      std::memcpy(&values.reals[a], found->data, sizeof(float));
    } else if (found->type == PluginFieldType::kINT32) {
      std::memcpy(&values.integers[a], found->data, sizeof(int32_t));
    } else if (found->type == PluginFieldType::kINT64) {  // ONNX's own type, which some parsers pass on
      int64_t wide;
      std::memcpy(&wide, found->data, sizeof wide);
      if (wide < 0 || wide > INT32_MAX) return op.attribute[a].name;
      values.integers[a] = static_cast<int32_t>(wide);
    } else {
      return op.attribute[a].name;
    }
  }
  return nullptr;
}

Plugin::Plugin(OpNumber number, const Values& values) noexcept : number_(number), values_(values) {
  int written = std::snprintf(timing_id_, sizeof timing_id_, "vtexport-%s", kVersion);
  for (int a = 0; a < op().attributes; ++a) {
    const Attribute& attribute = op().attribute[a];
    if (attribute.is_float) {
      fields_[a] = PluginField(attribute.name, &values_.reals[a], PluginFieldType::kFLOAT32, 1);
      written += std::snprintf(timing_id_ + written, sizeof timing_id_ - written, "-%a", values_.reals[a]);
    } else {
      fields_[a] = PluginField(attribute.name, &values_.integers[a], PluginFieldType::kINT32, 1);
      written += std::snprintf(timing_id_ + written, sizeof timing_id_ - written, "-%d", values_.integers[a]);
    }
  }
  collection_ = {op().attributes, fields_.data()};
}

nvinfer1::IPluginCapability* Plugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
  switch (type) {
    case nvinfer1::PluginCapabilityType::kCORE:
      return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD:
      return static_cast<nvinfer1::v_1_0::IPluginV3OneBuild*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME:
      return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

nvinfer1::IPluginV3* Plugin::clone() noexcept { return new (std::nothrow) Plugin(*this); }

int32_t Plugin::configurePlugin(const nvinfer1::DynamicPluginTensorDesc*, int32_t,
                                const nvinfer1::DynamicPluginTensorDesc*, int32_t) noexcept {
  return 0;
}

int32_t Plugin::getOutputDataTypes(DataType* types, int32_t outputs, const DataType* input_types,
                                   int32_t inputs) const noexcept {
  if (outputs != op().outputs || inputs != op().inputs) return kFailed;
  for (int i = 0; i < outputs; ++i) types[i] = data_type(op().output[i].kind, input_types[0]);
  return 0;
}

int32_t Plugin::getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t number, const nvinfer1::DimsExprs*, int32_t,
                                nvinfer1::DimsExprs* outputs, int32_t number_outputs,
                                nvinfer1::IExprBuilder&) noexcept {
  if (number != op().inputs || number_outputs != op().outputs) return kFailed;
  for (int i = 0; i < number_outputs; ++i) {
    const Output& output = op().output[i];
    outputs[i].nbDims = output.dimensions;
    for (int d = 0; d < output.dimensions; ++d) {
      const Extent& extent = output.extents[d];
      if (extent.axis < inputs[extent.input].nbDims) {
        outputs[i].d[d] = inputs[extent.input].d[extent.axis];
      } else {
        log_error(op(), "an input has too few dimensions");
        return kFailed;
      }
    }
  }
  return 0;
}

bool Plugin::supportsFormatCombination(int32_t place, const nvinfer1::DynamicPluginTensorDesc* tensors, int32_t inputs,
                                       int32_t outputs) noexcept {
  if (inputs != op().inputs || outputs != op().outputs || place < 0 || place >= inputs + outputs) return false;
  const nvinfer1::PluginTensorDesc& tensor = tensors[place].desc;
  if (tensor.format != nvinfer1::TensorFormat::kLINEAR) return false;
  const Kind kind = place < inputs ? op().input[place].kind : op().output[place - inputs].kind;
  // All elements are of one type, that of the first input.
  return is_kind(tensor.type, kind) && (kind != Kind::kElement || tensor.type == tensors[0].desc.type);
}

size_t Plugin::getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t number,
                                const nvinfer1::DynamicPluginTensorDesc*, int32_t) const noexcept {
  DType type;
  if (number != op().inputs || !element_type(inputs[0].desc.type, type)) return 0;
  auto dims = [inputs](int i) { return inputs[i].max; };
  return with_problem(number_, values_, type, dims, [](const auto& problem) -> size_t {
    return asks_for_nothing(problem) ? 0 : backend::workspace_size(problem);
  });
}

int32_t Plugin::onShapeChange(const nvinfer1::PluginTensorDesc* inputs, int32_t number,
                              const nvinfer1::PluginTensorDesc*, int32_t) noexcept {
  DType type;
  if (number != op().inputs || !element_type(inputs[0].type, type)) return kFailed;
  auto dims = [inputs](int i) { return inputs[i].dims; };
  const char* refusal = with_problem(number_, values_, type, dims, [](const auto& problem) {
    return asks_for_nothing(problem) ? nullptr : problem.refusal();
  });
  if (refusal == nullptr) return 0;
  log_error(op(), refusal);
  return kFailed;
}

int32_t Plugin::enqueue(const nvinfer1::PluginTensorDesc* input_types, const nvinfer1::PluginTensorDesc*,
                        const void* const* inputs, void* const* outputs, void* workspace,
                        cudaStream_t stream) noexcept {
  DType type;
  if (!element_type(input_types[0].type, type)) return kFailed;
  auto dims = [input_types](int i) { return input_types[i].dims; };
  const bool nothing =
      with_problem(number_, values_, type, dims, [](const auto& problem) { return asks_for_nothing(problem); });
  if (nothing) return 0;
  for (int i = 0; i < op().inputs; ++i) {
    const Kind kind = op().input[i].kind;
    const size_t bytes = kind == Kind::kElement ? size_of(type) : kind == Kind::kInt64 ? 8 : 4;
    if (!is_empty(dims(i)) && (inputs[i] == nullptr || !aligned(inputs[i], bytes))) {
      char what[64];
      std::snprintf(what, sizeof what, "input %s is missing or misaligned", op().input[i].name);
      log_error(op(), what);
      return kFailed;
    }
  }
  auto in = [&](const char* name) { return inputs[input_number(op(), name)]; };
  auto out = [&](const char* name) { return outputs[output_number(op(), name)]; };
  auto floats = [&](const char* name) { return static_cast<const float*>(in(name)); };
  cudaError_t error = cudaErrorInvalidValue;
  switch (number_) {
    case kScore:
    case kScoreHeads: {
      const bool heads = number_ == kScoreHeads;
      error = backend::token_score(score_problem(values_, heads, type, dims), in("query"), in("key"),
                                   static_cast<const int64_t*>(in("places")), static_cast<const int64_t*>(in("start")),
                                   heads ? floats("divisor") : nullptr, static_cast<float*>(out("score")), workspace,
                                   stream);
      break;
    }
    case kSelect:
      error = backend::token_select(select_problem(type, dims), in("hidden"), floats("score"), out("kept"),
                                    static_cast<int32_t*>(out("index")), static_cast<int32_t*>(out("rank")), workspace,
                                    stream);
      break;
    case kRecycle:
      error = backend::token_recycle(recycle_problem(values_, type, dims), in("hidden"),
                                     static_cast<const int32_t*>(in("rank")), out("merged"),
                                     static_cast<int32_t*>(out("centres")), static_cast<int32_t*>(out("cluster")),
                                     workspace, stream);
      break;
  }
  if (error == cudaSuccess) return 0;
  char what[64];
  std::snprintf(what, sizeof what, "the kernel failed with CUDA error %d", static_cast<int>(error));
  log_error(op(), what);
  return kFailed;
}

const nvinfer1::PluginFieldCollection* Plugin::getFieldsToSerialize() noexcept { return &collection_; }

Creator::Creator(OpNumber number) noexcept : number_(number) {
  const Op& op = kOps[number];
  for (int a = 0; a < op.attributes; ++a) {
    const auto type = op.attribute[a].is_float ? PluginFieldType::kFLOAT32 : PluginFieldType::kINT32;
    fields_[a] = PluginField(op.attribute[a].name, nullptr, type, 1);
  }
  collection_ = {op.attributes, fields_.data()};
}

nvinfer1::IPluginV3* Creator::createPlugin(const char*, const nvinfer1::PluginFieldCollection* fields,
                                           nvinfer1::TensorRTPhase) noexcept {
  Values values;
  const char* wrong = read_fields(kOps[number_], fields, values);
  if (wrong != nullptr) {
    char what[96];
    std::snprintf(what, sizeof what, "attribute %s is missing or of a wrong type", wrong);
    log_error(kOps[number_], what);
    return nullptr;
  }
  return new (std::nothrow) Plugin(number_, values);
}

}  // namespace vtexport::trt

// The functions that TensorRT looks for in a plugin library.
extern "C" {

__attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
  vtexport::trt::g_logger_finder = finder;
}

__attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& number) {
  using vtexport::trt::Creator;
  static Creator creators[] = {Creator(vtexport::trt::kScore), Creator(vtexport::trt::kScoreHeads),
                               Creator(vtexport::trt::kSelect), Creator(vtexport::trt::kRecycle)};
  static nvinfer1::IPluginCreatorInterface* const list[] = {&creators[0], &creators[1], &creators[2], &creators[3]};
  number = 4;
  return list;
}

}  // extern "C"
