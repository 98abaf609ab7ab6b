// A libFuzzer target: bytes become the fields that a plugin is created from, the tensors that TensorRT asks it about, and
// the arrays that it runs on. Whatever they are, nothing may be read or written outside what it was given. The plugins are
// those over the CPU twins, so that a small problem that is not refused also runs, on arrays of exactly the declared sizes.
//   fuzz_creation CORPUS -runs=N    (built with -DVTEXPORT_FUZZ=ON by clang++)
#include <NvInferRuntime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "shapes.h"
#include "tensorrt/ops.h"

extern "C" nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& number);
extern "C" void setLoggerFinder(nvinfer1::ILoggerFinder* finder);

namespace {

using namespace nvinfer1;
using vtexport::trt::Builder;
using vtexport::trt::kOps;
using vtexport::trt::Kind;
using vtexport::trt::Number;
using vtexport::trt::Op;

void expect(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::abort();
}

struct Logger : ILogger {
  void log(Severity, const AsciiChar* line) noexcept override { expect(std::strlen(line) < 256, "a line is too long"); }
} logger;

struct Finder : ILoggerFinder {
  ILogger* findLogger() override { return &logger; }
} finder;

// Reads from the front of the input; zeros once it is used up.
class Source {
 public:
  Source(const uint8_t* data, size_t size) : data_(data), left_(size) {}
  uint8_t byte() {
    if (left_ == 0) return 0;
    --left_;
    return *data_++;
  }
  template <typename T>
  T number() {
    unsigned char bytes[sizeof(T)];
    for (unsigned char& one : bytes) one = byte();
    T value;
    std::memcpy(&value, bytes, sizeof value);
    return value;
  }

 private:
  const uint8_t* data_;
  size_t left_;
};

// A field's data is a block of its own with no byte to spare, so that a read beyond `length` elements is found.
struct Fields {
  std::vector<std::unique_ptr<char[]>> blocks;
  std::vector<std::string> names;
  std::vector<PluginField> fields;
  PluginFieldCollection collection{};

  Fields(Source& from, const Op& op) {
    constexpr int kMost = 6;
    const int count = from.byte() % (kMost + 1);
    names.reserve(kMost);
    for (int i = 0; i < count; ++i) fields.push_back(field(from, op));
    const uint8_t odd = from.byte();
    collection.nbFields = odd == 255 ? from.number<int32_t>() | INT32_MIN : count;
    collection.fields = odd == 254 || fields.empty() ? nullptr : fields.data();
    if (odd == 253) collection.nbFields = 1, collection.fields = nullptr;
  }

 private:
  PluginField field(Source& from, const Op& op) {
    const uint8_t which = from.byte();
    names.emplace_back();
    if (which < 200 && op.attributes > 0) names.back() = op.attribute[which % op.attributes].name;
    for (int left = which < 200 ? 0 : which % 40; left > 0; --left) names.back() += static_cast<char>(from.byte());
    const auto type = static_cast<PluginFieldType>(from.byte() % 14);
    const uint8_t form = from.byte();
    const int32_t length = form < 200 ? 1 : form < 250 ? form - 200 : from.number<int32_t>();
    // No more is allocated than a sound reader may touch: nothing at all where the length is not one.
    const size_t bytes = type == PluginFieldType::kFLOAT64 || type == PluginFieldType::kINT64 ? 8
                         : type == PluginFieldType::kFLOAT32 || type == PluginFieldType::kINT32 ? 4 : 1;
    blocks.emplace_back(length == 1 ? new char[bytes] : new char[0]);
    for (size_t i = 0; length == 1 && i < bytes; ++i) blocks.back()[i] = static_cast<char>(from.byte());
    const bool named = which != 255, filled = form != 199;
    return PluginField(named ? names.back().c_str() : nullptr, filled ? blocks.back().get() : nullptr, type, length);
  }
};

int64_t odd_extent(Source& from) {
  const int64_t odd[] = {-1, INT32_MAX, int64_t{INT32_MAX} + 1, int64_t{1} << 32, INT64_MAX, INT64_MIN, 1 << 20, 65536};
  const uint8_t which = from.byte();
  return which < 128 ? odd[which % 8] : from.number<int64_t>();
}

// Extents that fit together, by the letters of the op's table, with now and then one that does not.
std::vector<PluginTensorDesc> tensors(Source& from, const Op& op) {
  const DataType elements[] = {DataType::kFLOAT, DataType::kHALF, DataType::kBF16, static_cast<DataType>(from.byte() % 16)};
  const DataType element = elements[from.byte() % 16 == 0 ? 3 : from.byte() % 3];
  int64_t extents[128];
  for (char letter = 'a'; letter <= 'z'; ++letter) extents[static_cast<int>(letter)] = -2;
  std::vector<PluginTensorDesc> made;
  for (int i = 0; i < op.inputs; ++i) {
    PluginTensorDesc desc{};
    const Kind kind = op.input[i].kind;
    desc.type = kind == Kind::kElement ? element : kind == Kind::kFloat32 ? DataType::kFLOAT
                : kind == Kind::kInt32 ? DataType::kINT32 : DataType::kINT64;
    desc.format = TensorFormat::kLINEAR;
    desc.dims.nbDims = op.input[i].dimensions();
    for (int d = 0; d < desc.dims.nbDims; ++d) {
      int64_t& extent = extents[static_cast<int>(op.input[i].shape[d])];
      if (extent == -2) {
        const uint8_t which = from.byte();
        extent = which < 250 ? which % 10 : odd_extent(from);
      }
      desc.dims.d[d] = extent;
    }
    const uint8_t odd = from.byte();
    if (odd == 255) desc.dims.nbDims = from.byte() % (Dims::MAX_DIMS + 2) - 1;
    if (odd == 254) desc.dims.d[from.byte() % 4] = odd_extent(from);
    if (odd == 253) desc.dims.d[from.byte() % 4] = from.byte() % 10;
    if (odd == 252) desc.type = static_cast<DataType>(from.byte() % 16);
    if (odd == 251) desc.format = static_cast<TensorFormat>(from.byte() % 14);
    made.push_back(desc);
  }
  return made;
}

// The bytes of a tensor; -1 if there are more than a quick run can have, or no such tensor.
int64_t size_of(DataType type, const Dims& dims) {
  constexpr int64_t kMost = 1 << 11;
  int64_t size = type == DataType::kINT64 ? 8 : type == DataType::kFLOAT || type == DataType::kINT32 ? 4 : 2;
  if (dims.nbDims < 0 || dims.nbDims > Dims::MAX_DIMS) return -1;
  for (int d = 0; d < dims.nbDims; ++d) {
    if (dims.d[d] < 0 || dims.d[d] > kMost) return -1;
    size *= dims.d[d];
    if (size > kMost) return -1;
  }
  return size;
}

struct Arrays {
  std::vector<std::unique_ptr<char[]>> blocks;
  std::vector<void*> places;

  void add(int64_t bytes, Source& from) {
    blocks.emplace_back(new char[static_cast<size_t>(bytes)]);
    for (int64_t i = 0; i < bytes; ++i) blocks.back()[static_cast<size_t>(i)] = static_cast<char>(from.byte());
    const uint8_t odd = from.byte();
    places.push_back(odd == 255 ? nullptr : odd == 254 ? blocks.back().get() + 1 : blocks.back().get());
  }
};

// The shapes of the outputs as TensorRT derives them; none if the plugin does not say.
std::vector<Dims> output_shapes(v_1_0::IPluginV3OneBuild* build, const Op& op, const std::vector<PluginTensorDesc>& in) {
  Builder builder;
  std::vector<std::unique_ptr<Number>> numbers;
  std::vector<DimsExprs> exprs(in.size()), found(static_cast<size_t>(op.outputs));
  for (size_t i = 0; i < in.size(); ++i) {
    exprs[i].nbDims = in[i].dims.nbDims;
    for (int d = 0; d < in[i].dims.nbDims && d < Dims::MAX_DIMS; ++d) {
      numbers.push_back(std::make_unique<Number>(in[i].dims.d[d]));
      exprs[i].d[d] = numbers.back().get();
    }
  }
  if (build->getOutputShapes(exprs.data(), op.inputs, nullptr, 0, found.data(), op.outputs, builder) != 0) return {};
  std::vector<Dims> shapes;
  for (const DimsExprs& one : found) {
    Dims dims{one.nbDims, {}};
    for (int d = 0; d < one.nbDims; ++d) dims.d[d] = one.d[d]->getConstantValue();
    shapes.push_back(dims);
  }
  return shapes;
}

void ask(IPluginV3* plugin, const Op& op, const std::vector<PluginTensorDesc>& in, Source& from) {
  auto* build = static_cast<v_1_0::IPluginV3OneBuild*>(plugin->getCapabilityInterface(PluginCapabilityType::kBUILD));
  auto* runtime = static_cast<IPluginV3OneRuntime*>(plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
  expect(build->getNbOutputs() == op.outputs && std::strlen(build->getTimingCacheID()) < 96, "outputs, or a name");
  std::vector<DataType> input_types, types(static_cast<size_t>(op.outputs));
  for (const PluginTensorDesc& desc : in) input_types.push_back(desc.type);
  expect(build->getOutputDataTypes(types.data(), op.outputs, input_types.data(), op.inputs) == 0, "types of outputs");
  const std::vector<Dims> shapes = output_shapes(build, op, in);
  std::vector<PluginTensorDesc> out;
  for (size_t i = 0; i < shapes.size(); ++i) {
    PluginTensorDesc desc{};
    desc.type = types[i], desc.dims = shapes[i], desc.format = TensorFormat::kLINEAR;
    out.push_back(desc);
  }
  out.resize(static_cast<size_t>(op.outputs));
  std::vector<DynamicPluginTensorDesc> all;
  for (const auto& list : {in, out}) {
    for (const PluginTensorDesc& desc : list) all.push_back({desc, desc.dims, desc.dims, desc.dims});
  }
  bool formats = true;
  for (int i = -1; i <= op.inputs + op.outputs; ++i) {
    const bool takes = build->supportsFormatCombination(i, all.data(), op.inputs, op.outputs);
    if (i >= 0 && i < op.inputs + op.outputs) formats = formats && takes;
  }
  build->configurePlugin(all.data(), op.inputs, all.data() + op.inputs, op.outputs);
  build->getWorkspaceSize(all.data(), op.inputs, all.data() + op.inputs, op.outputs);
  runtime->onShapeChange(in.data(), op.inputs, out.data(), op.outputs);
  if (!formats || shapes.empty()) return;  // TensorRT runs no plugin on types that it does not take
  Arrays inputs, outputs;
  for (size_t i = 0; i < in.size() + out.size(); ++i) {
    const PluginTensorDesc& desc = i < in.size() ? in[i] : out[i - in.size()];
    const int64_t bytes = size_of(desc.type, desc.dims);
    if (bytes < 0) return;
    (i < in.size() ? inputs : outputs).add(bytes, from);
  }
  runtime->enqueue(in.data(), out.data(), inputs.places.data(), outputs.places.data(), nullptr, nullptr);
}

// What a plugin serialises makes the same plugin again.
void check_fields(IPluginCreatorV3One* creator, IPluginV3* plugin, IPluginV3* other) {
  auto fields = [](IPluginV3* one) {
    return static_cast<IPluginV3OneRuntime*>(one->getCapabilityInterface(PluginCapabilityType::kRUNTIME))
        ->getFieldsToSerialize();
  };
  const PluginFieldCollection *first = fields(plugin), *second = fields(other);
  expect(first->nbFields == second->nbFields, "a copy has other fields");
  for (int32_t i = 0; i < first->nbFields; ++i) {
    const PluginField &a = first->fields[i], &b = second->fields[i];
    expect(std::strcmp(a.name, b.name) == 0 && a.type == b.type && a.length == 1 && b.length == 1, "a field changed");
    expect(a.data != b.data && std::memcmp(a.data, b.data, 4) == 0, "a value changed");
  }
  std::unique_ptr<IPluginV3> again(creator->createPlugin("again", first, TensorRTPhase::kRUNTIME));
  expect(again != nullptr, "what a plugin serialises is refused");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  setLoggerFinder(&finder);
  Source from(data, size);
  int32_t number = 0;
  IPluginCreatorInterface* const* creators = getCreators(number);
  const int which = from.byte() % number;
  const Op& op = kOps[static_cast<size_t>(which)];
  auto* creator = static_cast<IPluginCreatorV3One*>(creators[which]);
  const Fields fields(from, op);
  const auto phase = from.byte() % 2 == 0 ? TensorRTPhase::kBUILD : TensorRTPhase::kRUNTIME;
  std::unique_ptr<IPluginV3> plugin(creator->createPlugin("layer", &fields.collection, phase));
  if (plugin == nullptr) return 0;
  std::unique_ptr<IPluginV3> copy(plugin->clone());
  check_fields(creator, plugin.get(), copy.get());
  if (from.byte() % 2 == 1) plugin.swap(copy), copy.reset();
  ask(plugin.get(), op, tensors(from, op), from);
  return 0;
}
