// Shape expressions as TensorRT gives them where every extent is known, for programs that drive plugins without TensorRT.
#pragma once

#include <NvInferRuntime.h>

#include <memory>
#include <vector>

namespace vtexport::trt {

using namespace nvinfer1;

// One that is a number.
class Number : public IDimensionExpr, apiv::VDimensionExpr {
 public:
  explicit Number(int64_t value) : value_(value) { mImpl = this; }
  bool isConstant() const noexcept override { return true; }
  int64_t getConstantValue() const noexcept override { return value_; }
  bool isSizeTensor() const noexcept override { return false; }

 private:
  int64_t value_;
};

class Builder : public IExprBuilder, apiv::VExprBuilder {
 public:
  Builder() { mImpl = this; }
  const IDimensionExpr* constant(int64_t value) noexcept override {
    made_.push_back(std::make_unique<Number>(value));
    return made_.back().get();
  }
  const IDimensionExpr* operation(DimensionOperation, const IDimensionExpr&, const IDimensionExpr&) noexcept override {
    return nullptr;
  }
  const IDimensionExpr* declareSizeTensor(int32_t, const IDimensionExpr&, const IDimensionExpr&) noexcept override {
    return nullptr;
  }

 private:
  std::vector<std::unique_ptr<Number>> made_;
};

}  // namespace vtexport::trt
