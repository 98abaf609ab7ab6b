#include "tensorrt/plugin.h"

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <new>

namespace vtexport::trt {
namespace {

using nvinfer1::DataType;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

constexpr int32_t kFailed = 1;

// Several registries of a process, each on a thread of its own, may load the library.
std::atomic<nvinfer1::ILoggerFinder*> g_logger_finder{nullptr};

void log_error(const Op& op, const char* what) noexcept {
  nvinfer1::ILoggerFinder* finder = g_logger_finder;
  nvinfer1::ILogger* logger = finder == nullptr ? nullptr : finder->findLogger();
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

bool usable(const void* pointer, Kind kind, DType element) {
  const size_t bytes = kind == Kind::kElement ? size_of(element) : kind == Kind::kInt64 ? 8 : 4;
  return pointer != nullptr && reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

bool is_empty(const nvinfer1::Dims& dims) {
  for (int d = 0; d < dims.nbDims; ++d) {
    if (dims.d[d] == 0) return true;
  }
  return false;
}

// The name of the first tensor that is missing or misaligned; null if there is none. Of a problem that is not refused, no
// output is empty.
template <typename Dims>
const char* find_unusable(const Op& op, DType type, Dims dims, const void* const* inputs, void* const* outputs) {
  for (int i = 0; i < op.inputs; ++i) {
    if (!is_empty(dims(i)) && !usable(inputs[i], op.input[i].kind, type)) return op.input[i].name;
  }
  for (int i = 0; i < op.outputs; ++i) {
    if (!usable(outputs[i], op.output[i].kind, type)) return op.output[i].name;
  }
  return nullptr;
}

}  // namespace

const char* read_fields(const Op& op, const nvinfer1::PluginFieldCollection* fields, Values& values) noexcept {
  const int32_t count = fields == nullptr || fields->fields == nullptr ? 0 : fields->nbFields;
  for (int a = 0; a < op.attributes; ++a) {
    const Attribute& attribute = op.attribute[a];
    const PluginField* found = nullptr;
    for (int32_t f = 0; f < count; ++f) {
      const PluginField& field = fields->fields[f];
      if (field.name == nullptr || std::strcmp(field.name, attribute.name) != 0) continue;
      if (found != nullptr) return attribute.name;
      found = &field;
    }
    if (found == nullptr || found->data == nullptr || found->length != 1) return attribute.name;
    if (attribute.is_float) {
      if (found->type != PluginFieldType::kFLOAT32) return attribute.name;
      std::memcpy(&values.reals[a], found->data, sizeof(float));
      if (!std::isfinite(values.reals[a])) return attribute.name;
      continue;
    }
    int64_t value;
    if (found->type == PluginFieldType::kINT32) {
      int32_t narrow;
      std::memcpy(&narrow, found->data, sizeof narrow);
      value = narrow;
    } else if (found->type == PluginFieldType::kINT64) {  // ONNX's own type, which some parsers pass on
      std::memcpy(&value, found->data, sizeof value);
    } else {
      return attribute.name;
    }
    if (value < attribute.least || value > attribute.most) return attribute.name;
    values.integers[a] = static_cast<int32_t>(value);
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
  for (int i = 0; i < number; ++i) {
    if (inputs[i].nbDims == op().input[i].dimensions()) continue;
    log_error(op(), "an input has another number of dimensions");
    return kFailed;
  }
  for (int i = 0; i < number_outputs; ++i) {
    const Output& output = op().output[i];
    outputs[i].nbDims = output.dimensions;
    for (int d = 0; d < output.dimensions; ++d) {
      outputs[i].d[d] = inputs[output.extents[d].input].d[output.extents[d].axis];
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
  return workspace_size(number_, values_, type, [inputs](int i) { return inputs[i].max; });
}

int32_t Plugin::onShapeChange(const nvinfer1::PluginTensorDesc* inputs, int32_t number,
                              const nvinfer1::PluginTensorDesc*, int32_t) noexcept {
  DType type;
  if (number != op().inputs || !element_type(inputs[0].type, type)) return kFailed;
  const Demand asked = demand(number_, values_, type, [inputs](int i) { return inputs[i].dims; });
  if (asked.refusal == nullptr) return 0;
  log_error(op(), asked.refusal);
  return kFailed;
}

int32_t Plugin::enqueue(const nvinfer1::PluginTensorDesc* input_types, const nvinfer1::PluginTensorDesc*,
                        const void* const* inputs, void* const* outputs, void* workspace,
                        cudaStream_t stream) noexcept {
  DType type;
  if (!element_type(input_types[0].type, type)) return kFailed;
  auto dims = [input_types](int i) { return input_types[i].dims; };
  const Demand asked = demand(number_, values_, type, dims);
  if (asked.nothing) return 0;
  if (asked.refusal != nullptr) {
    log_error(op(), asked.refusal);
    return kFailed;
  }
  const char* unusable = find_unusable(op(), type, dims, inputs, outputs);
  if (unusable != nullptr) {
    char what[64];
    std::snprintf(what, sizeof what, "tensor %s is missing or misaligned", unusable);
    log_error(op(), what);
    return kFailed;
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
    std::snprintf(what, sizeof what, "attribute %s is missing, repeated, of a wrong type or out of range", wrong);
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
