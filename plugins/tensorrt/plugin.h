// The plugin of any of the four ops, and its creator.
#pragma once

#include <NvInferRuntime.h>

#include "tensorrt/ops.h"

namespace vtexport::trt {

// Reads the op's attributes from `fields`; fields of other names, which parsers add, are ignored.
// Returns null if all are there, else the name of the first that is missing, repeated, of a wrong type or out of range.
const char* read_fields(const Op& op, const nvinfer1::PluginFieldCollection* fields, Values& values) noexcept;

class Plugin final : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public nvinfer1::v_1_0::IPluginV3OneBuild,
                     public nvinfer1::IPluginV3OneRuntime {
 public:
  Plugin(OpNumber number, const Values& values) noexcept;
  Plugin(const Plugin& other) noexcept : Plugin(other.number_, other.values_) {}

  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
  nvinfer1::IPluginV3* clone() noexcept override;

  const char* getPluginName() const noexcept override { return op().name; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return ""; }

  int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc*, int32_t, const nvinfer1::DynamicPluginTensorDesc*,
                          int32_t) noexcept override;
  int32_t getOutputDataTypes(nvinfer1::DataType* types, int32_t outputs, const nvinfer1::DataType* input_types,
                             int32_t inputs) const noexcept override;
  int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t number, const nvinfer1::DimsExprs*, int32_t,
                          nvinfer1::DimsExprs* outputs, int32_t number_outputs,
                          nvinfer1::IExprBuilder& builder) noexcept override;
  bool supportsFormatCombination(int32_t place, const nvinfer1::DynamicPluginTensorDesc* tensors, int32_t inputs,
                                 int32_t outputs) noexcept override;
  int32_t getNbOutputs() const noexcept override { return op().outputs; }
  size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t number,
                          const nvinfer1::DynamicPluginTensorDesc*, int32_t) const noexcept override;
  const char* getTimingCacheID() noexcept override { return timing_id_; }

  int32_t onShapeChange(const nvinfer1::PluginTensorDesc* inputs, int32_t number, const nvinfer1::PluginTensorDesc*,
                        int32_t) noexcept override;
  int32_t enqueue(const nvinfer1::PluginTensorDesc* input_types, const nvinfer1::PluginTensorDesc*,
                  const void* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override;
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override { return clone(); }
  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override;

 private:
  const Op& op() const { return kOps[number_]; }

  OpNumber number_;
  Values values_;
  std::array<nvinfer1::PluginField, kMaxAttributes> fields_;
  nvinfer1::PluginFieldCollection collection_;
  char timing_id_[96];
};

class Creator final : public nvinfer1::IPluginCreatorV3One {
 public:
  explicit Creator(OpNumber number) noexcept;

  nvinfer1::IPluginV3* createPlugin(const char* name, const nvinfer1::PluginFieldCollection* fields,
                                    nvinfer1::TensorRTPhase phase) noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
  const char* getPluginName() const noexcept override { return kOps[number_].name; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return ""; }

 private:
  OpNumber number_;
  std::array<nvinfer1::PluginField, kMaxAttributes> fields_;
  nvinfer1::PluginFieldCollection collection_;
};

}  // namespace vtexport::trt
