// The four ops as TensorRT sees them: attributes, tensors, shapes, and how a set of tensors becomes a problem.
#pragma once

#include <NvInferRuntime.h>

#include <array>
#include <cstdint>
#include <cstring>

#include "tensorrt/backend.h"
#include "vtexport/contract.h"

namespace vtexport::trt {

constexpr int kMaxAttributes = 2;

struct Attribute {
  const char* name;
  bool is_float;
  int32_t least, most;  // of an integer; a float is any number
};

// Values in the order of the op's attributes.
struct Values {
  std::array<int32_t, kMaxAttributes> integers{};
  std::array<float, kMaxAttributes> reals{};
};

enum class Kind { kElement, kFloat32, kInt32, kInt64 };  // kElement: fp32, fp16 or bf16, all alike

// A shape has a letter for each axis. Axes of an op's inputs that have the same letter are of the same extent.
struct Input {
  const char* name;
  Kind kind;
  const char* shape;

  int dimensions() const { return static_cast<int>(std::strlen(shape)); }
};

// An extent of an output: that of an input.
struct Extent {
  int input, axis;
};

struct Output {
  const char* name;
  Kind kind;
  int dimensions;
  std::array<Extent, 3> extents;
};

// One op: everything but its kernel.
struct Op {
  const char* name;
  int attributes;
  std::array<Attribute, kMaxAttributes> attribute;
  int inputs;
  std::array<Input, 6> input;
  int outputs;
  std::array<Output, 3> output;
};

constexpr Extent of(int input, int axis) { return {input, axis}; }

// That of the op domain, by which a parser finds a node's plugin. It changes whenever the inputs, attributes, outputs or
// the meaning of an op do.
constexpr const char* kVersion = "2";

// Numbers of tokens are the lengths of inputs whose values are not read: `count`, `keep`, `pool` and `clusters`. They may
// differ between the profiles of an engine, and TensorRT derives the shapes of outputs from them.
//
// The one place in C++ that knows the order of inputs, attributes and outputs; all else finds them by name. It is that of
// the ONNX functions in exporter/vtexport/graph/pruning_functions.py, with which a test compares this table.
inline constexpr std::array<Op, 4> kOps{{
    {"TokenScore", 1, {{{"scale", true, 0, 0}}}, 5,
     {{{"query", Kind::kElement, "bhrd"}, {"key", Kind::kElement, "bgkd"}, {"places", Kind::kInt64, "br"},
       {"start", Kind::kInt64, "b"}, {"count", Kind::kInt32, "v"}}}, 1,
     {{{"score", Kind::kFloat32, 2, {of(0, 0), of(4, 0)}}}}},
    {"TokenScoreHeads", 2, {{{"scale", true, 0, 0}, {"heads", false, 1, INT32_MAX}}}, 6,
     {{{"query", Kind::kElement, "bhrd"}, {"key", Kind::kElement, "bgkd"}, {"places", Kind::kInt64, "br"},
       {"start", Kind::kInt64, "b"}, {"divisor", Kind::kFloat32, "brv"}, {"count", Kind::kInt32, "v"}}}, 1,
     {{{"score", Kind::kFloat32, 2, {of(0, 0), of(5, 0)}}}}},
    {"TokenSelect", 0, {}, 3,
     {{{"hidden", Kind::kElement, "btw"}, {"score", Kind::kFloat32, "bt"}, {"keep", Kind::kInt32, "k"}}}, 3,
     {{{"kept", Kind::kElement, 3, {of(0, 0), of(2, 0), of(0, 2)}},
       {"index", Kind::kInt32, 2, {of(0, 0), of(2, 0)}},
       {"rank", Kind::kInt32, 2, {of(1, 0), of(1, 1)}}}}},
    {"TokenRecycle", 1, {{{"paper", false, 0, 1}}}, 5,
     {{{"hidden", Kind::kElement, "btw"}, {"rank", Kind::kInt32, "bt"}, {"keep", Kind::kInt32, "k"},
       {"pool", Kind::kInt32, "p"}, {"clusters", Kind::kInt32, "c"}}}, 3,
     {{{"merged", Kind::kElement, 3, {of(0, 0), of(4, 0), of(0, 2)}},
       {"centres", Kind::kInt32, 2, {of(0, 0), of(4, 0)}},
       {"cluster", Kind::kInt32, 2, {of(1, 0), of(1, 1)}}}}},
}};

enum OpNumber { kScore, kScoreHeads, kSelect, kRecycle };

// The number of the entry called `name` among the first `count` of `entries`; there is one, or -1 if not.
template <typename Entries>
constexpr int number_of(const Entries& entries, int count, const char* name) {
  for (int i = 0; i < count; ++i) {
    const char *a = entries[i].name, *b = name;
    while (*a != 0 && *a == *b) ++a, ++b;
    if (*a == *b) return i;
  }
  return -1;
}
constexpr int input_number(const Op& op, const char* name) { return number_of(op.input, op.inputs, name); }
constexpr int output_number(const Op& op, const char* name) { return number_of(op.output, op.outputs, name); }
constexpr int attribute_number(const Op& op, const char* name) { return number_of(op.attribute, op.attributes, name); }

inline bool element_type(nvinfer1::DataType type, DType& found) {
  switch (type) {
    case nvinfer1::DataType::kFLOAT:
      found = DType::kFloat32;
      return true;
    case nvinfer1::DataType::kHALF:
      found = DType::kFloat16;
      return true;
    case nvinfer1::DataType::kBF16:
      found = DType::kBFloat16;
      return true;
    default:
      return false;
  }
}

inline bool is_kind(nvinfer1::DataType type, Kind kind) {
  DType element;
  switch (kind) {
    case Kind::kElement:
      return element_type(type, element);
    case Kind::kFloat32:
      return type == nvinfer1::DataType::kFLOAT;
    case Kind::kInt32:
      return type == nvinfer1::DataType::kINT32;
    case Kind::kInt64:
      return type == nvinfer1::DataType::kINT64;
  }
  return false;
}

// An extent as the contract has it; -1, which every problem refuses, if there is no such axis or int32 cannot hold it.
inline int32_t extent(const nvinfer1::Dims& dims, int axis) {
  if (axis >= dims.nbDims || dims.d[axis] < 0 || dims.d[axis] > INT32_MAX) return -1;
  return static_cast<int32_t>(dims.d[axis]);
}

// Why the shapes of an op's inputs do not belong together; null if they do. `dims(i)` gives the nvinfer1::Dims of input i.
template <typename Dims>
const char* shape_refusal(const Op& op, Dims dims) {
  std::array<int64_t, 128> known;
  known.fill(-1);
  for (int i = 0; i < op.inputs; ++i) {
    const nvinfer1::Dims shape = dims(i);
    if (shape.nbDims != op.input[i].dimensions()) return "an input has another number of dimensions";
    for (int d = 0; d < shape.nbDims; ++d) {
      int64_t& expected = known[static_cast<unsigned char>(op.input[i].shape[d])];
      if (expected >= 0 && shape.d[d] != expected) return "the shapes of the inputs do not fit together";
      expected = shape.d[d];
    }
  }
  return nullptr;
}

template <typename Dims>
ScoreProblem score_problem(const Values& v, bool heads, DType type, Dims dims) {
  const Op& op = kOps[heads ? kScoreHeads : kScore];
  const auto query = dims(input_number(op, "query")), key = dims(input_number(op, "key"));
  return {extent(query, 0),
          extent(query, 1),
          extent(key, 1),
          extent(query, 2),
          extent(key, 2),
          extent(query, 3),
          extent(dims(input_number(op, "count")), 0),
          v.reals[attribute_number(op, "scale")],
          heads ? v.integers[attribute_number(op, "heads")] : 0,
          type};
}

template <typename Dims>
SelectProblem select_problem(DType type, Dims dims) {
  const Op& op = kOps[kSelect];
  const auto hidden = dims(input_number(op, "hidden"));
  return {extent(hidden, 0), extent(hidden, 1), extent(hidden, 2), extent(dims(input_number(op, "keep")), 0), type};
}

template <typename Dims>
RecycleProblem recycle_problem(const Values& v, DType type, Dims dims) {
  const Op& op = kOps[kRecycle];
  const auto hidden = dims(input_number(op, "hidden"));
  auto length = [&](const char* name) { return extent(dims(input_number(op, name)), 0); };
  return {extent(hidden, 0),
          extent(hidden, 1),
          extent(hidden, 2),
          length("keep"),
          length("pool"),
          length("clusters"),
          v.integers[attribute_number(op, "paper")] != 0,
          type};
}

// Whether a problem asks for no token at all, as in a profile without an image, or in one whose plan does nothing at this
// place. Nothing is computed then, and what outputs there are nobody reads.
inline bool asks_for_nothing(const ScoreProblem& p) { return p.batch == 0 || p.visual == 0; }
inline bool asks_for_nothing(const SelectProblem& p) { return p.batch == 0 || p.keep == 0; }
inline bool asks_for_nothing(const RecycleProblem& p) { return p.batch == 0 || p.clusters == 0; }

// Calls `use` with the problem of an op.
template <typename Dims, typename Use>
auto with_problem(OpNumber number, const Values& v, DType type, Dims dims, Use use) {
  if (number == kSelect) return use(select_problem(type, dims));
  if (number == kRecycle) return use(recycle_problem(v, type, dims));
  return use(score_problem(v, number == kScoreHeads, type, dims));
}

// What a set of tensors asks of an op.
struct Demand {
  bool nothing;         // no token: nothing is read or written, whatever the other shapes are
  const char* refusal;  // why no kernel can do it; null if every one can
};

template <typename Dims>
Demand demand(OpNumber number, const Values& v, DType type, Dims dims) {
  return with_problem(number, v, type, dims, [&](const auto& problem) -> Demand {
    if (asks_for_nothing(problem)) return {true, nullptr};
    const char* refusal = problem.refusal();
    return {false, refusal != nullptr ? refusal : shape_refusal(kOps[number], dims)};
  });
}

// More bytes than any GPU has: no engine is built for what is beyond the contract's limits.
constexpr size_t kNoWorkspace = size_t{1} << 60;

// `dims(i)` gives the upper bounds of the extents of input i. TensorRT finds each on its own, so they need not fit together.
template <typename Dims>
size_t workspace_size(OpNumber number, const Values& v, DType type, Dims dims) {
  return with_problem(number, v, type, dims, [](const auto& problem) -> size_t {
    if (asks_for_nothing(problem)) return 0;
    return problem.within_limits() ? backend::workspace_size(problem) : kNoWorkspace;
  });
}

}  // namespace vtexport::trt
