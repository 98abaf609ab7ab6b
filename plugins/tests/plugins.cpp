// Drives every plugin of a library as TensorRT would, without TensorRT: creators, attributes, clones, serialisation, types,
// shapes, formats, workspace, and enqueue against the CPU twins.
//   drive_plugins LIBRARY            one built with VTEXPORT_PLUGINS_ON_CPU: enqueue takes host pointers
//   drive_plugins LIBRARY --device   the real one, on a GPU: device pointers, two runs that must give the same bits
#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <cmath>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/number.h"

namespace {

using namespace nvinfer1;

void expect(bool holds, const std::string& what) {
  if (holds) return;
  std::fprintf(stderr, "failed: %s\n", what.c_str());
  std::exit(1);
}

// A shape expression that is a number, as TensorRT gives where every extent is known.
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

struct Logger : ILogger {
  int lines = 0;
  void log(Severity, const AsciiChar*) noexcept override { ++lines; }
} logger;

struct Finder : ILoggerFinder {
  ILogger* findLogger() override { return &logger; }
} finder;

Dims shape(std::initializer_list<int64_t> extents) {
  Dims dims{static_cast<int32_t>(extents.size()), {}};
  std::copy(extents.begin(), extents.end(), dims.d);
  return dims;
}

struct Tensor {
  DataType type;
  Dims dims;
  std::vector<char> bytes;

  Tensor(DataType t, Dims d) : type(t), dims(d) {
    size_t size = t == DataType::kINT64 ? 8 : t == DataType::kBOOL ? 1 : t == DataType::kFLOAT || t == DataType::kINT32 ? 4 : 2;
    for (int i = 0; i < d.nbDims; ++i) size *= static_cast<size_t>(d.d[i]);
    bytes.resize(size);
  }
  template <typename T>
  T* as() {
    return reinterpret_cast<T*>(bytes.data());
  }
  template <typename T>
  size_t count() const {
    return bytes.size() / sizeof(T);
  }
  PluginTensorDesc desc() const {
    PluginTensorDesc found{};
    found.dims = dims;
    found.type = type;
    found.format = TensorFormat::kLINEAR;
    return found;
  }
};

std::mt19937 generator(7);

// fp16 numbers near one, either sign: exponents are drawn, so that every bit pattern is a number.
void fill(Tensor& tensor) {
  if (tensor.type == DataType::kFLOAT) {
    std::normal_distribution<float> normal;
    for (size_t i = 0; i < tensor.count<float>(); ++i) tensor.as<float>()[i] = normal(generator);
    return;
  }
  for (size_t i = 0; i < tensor.count<uint16_t>(); ++i) {
    const uint16_t sign = static_cast<uint16_t>((generator() & 1u) << 15);
    const uint16_t body = tensor.type == DataType::kHALF ? static_cast<uint16_t>(0x3800u + generator() % 0x800u)
                                                         : static_cast<uint16_t>(0x3F00u + generator() % 0x100u);
    tensor.as<uint16_t>()[i] = sign | body;
  }
}

vtexport::DType element(DataType type) {
  return type == DataType::kFLOAT  ? vtexport::DType::kFloat32
         : type == DataType::kHALF ? vtexport::DType::kFloat16
                                   : vtexport::DType::kBFloat16;
}

bool on_device = false;

// Bytes where enqueue reads and writes them: a device buffer, or the tensor's own.
class Place {
 public:
  explicit Place(std::vector<char>& bytes) : bytes_(bytes) {
    if (!on_device) return;
    // Never empty, and guarded by what an out-of-bounds write would have to cross under compute-sanitizer.
    expect(cudaMalloc(&memory_, bytes.size() + 1) == cudaSuccess, "cudaMalloc");
    expect(cudaMemcpy(memory_, bytes.data(), bytes.size(), cudaMemcpyHostToDevice) == cudaSuccess, "copy to the device");
  }
  Place(Place&& other) noexcept : bytes_(other.bytes_), memory_(other.memory_) { other.memory_ = nullptr; }
  ~Place() {
    if (memory_ != nullptr) cudaFree(memory_);
  }
  void* get() { return on_device ? memory_ : bytes_.data(); }
  void read_back() {
    if (!on_device) return;
    expect(cudaMemcpy(bytes_.data(), memory_, bytes_.size(), cudaMemcpyDeviceToHost) == cudaSuccess, "copy back");
  }

 private:
  std::vector<char>& bytes_;
  void* memory_ = nullptr;
};

float number(const Tensor& tensor, size_t i) {
  const char* place = tensor.bytes.data() + i * (tensor.type == DataType::kFLOAT ? 4 : 2);
  if (tensor.type == DataType::kFLOAT) return *reinterpret_cast<const float*>(place);
  if (tensor.type == DataType::kHALF) return vtexport::cpu::to_float(*reinterpret_cast<const vtexport::cpu::Float16*>(place));
  return vtexport::cpu::to_float(*reinterpret_cast<const vtexport::cpu::BFloat16*>(place));
}

// Integers are equal; numbers up to what another order of summation, or one rounding to `element`, may change.
bool same(const Tensor& found, const Tensor& expected, DataType element) {
  if (!on_device || expected.type == DataType::kINT32) return found.bytes == expected.bytes;
  const float allowed = element == DataType::kFLOAT ? 1e-5f : element == DataType::kHALF ? 2e-3f : 1e-2f;
  const size_t count = found.bytes.size() / (found.type == DataType::kFLOAT ? 4 : 2);
  for (size_t i = 0; i < count; ++i) {
    const float a = number(found, i), b = number(expected, i);
    if (!(std::fabs(a - b) <= allowed * (1 + std::fabs(b)))) return false;
  }
  return true;
}

struct Case {
  std::vector<std::pair<const char*, int64_t>> integers;
  float scale;  // 0: the op has none
  std::vector<Tensor> inputs, expected;
};

Case score_case(DataType type, bool heads) {
  const int64_t b = 2, h = 4, g = 2, r = 3, n = 11, d = 8, v = 5;
  Case c{{{"count", v}}, 0.35f, {}, {}};
  c.inputs = {Tensor(type, shape({b, h, r, d})), Tensor(type, shape({b, g, n, d})), Tensor(DataType::kBOOL, shape({b, r})),
              Tensor(DataType::kINT64, shape({b, r})), Tensor(DataType::kINT64, shape({b}))};
  fill(c.inputs[0]);
  fill(c.inputs[1]);
  for (int i = 0; i < b * r; ++i) {
    c.inputs[2].as<bool>()[i] = i % 3 != 1;
    c.inputs[3].as<int64_t>()[i] = n - 1 - i % 3;
  }
  for (int i = 0; i < b; ++i) c.inputs[4].as<int64_t>()[i] = 1 + i;
  if (heads) {
    c.integers.push_back({"heads", 2});
    c.inputs.emplace_back(DataType::kFLOAT, shape({b, r, v}));
    for (size_t i = 0; i < c.inputs[5].count<float>(); ++i) c.inputs[5].as<float>()[i] = 1.0f + static_cast<float>(i % 4);
  }
  c.expected = {Tensor(DataType::kFLOAT, shape({b, v}))};
  const vtexport::ScoreProblem p{2, 4, 2, 3, 11, 8, 5, c.scale, heads ? 2 : 0, element(type)};
  vtexport::cpu::token_score(p, c.inputs[0].bytes.data(), c.inputs[1].bytes.data(), c.inputs[2].as<bool>(),
                             c.inputs[3].as<int64_t>(), c.inputs[4].as<int64_t>(),
                             heads ? c.inputs[5].as<float>() : nullptr, c.expected[0].as<float>());
  return c;
}

Case select_case(DataType type) {
  Case c{{{"keep", 4}}, 0, {Tensor(type, shape({2, 9, 6})), Tensor(DataType::kFLOAT, shape({2, 9}))}, {}};
  fill(c.inputs[0]);
  fill(c.inputs[1]);
  c.expected = {Tensor(type, shape({2, 4, 6})), Tensor(DataType::kINT32, shape({2, 4}))};
  vtexport::cpu::token_select({2, 9, 6, 4, element(type)}, c.inputs[0].bytes.data(), c.inputs[1].as<float>(),
                              c.expected[0].bytes.data(), c.expected[1].as<int32_t>());
  return c;
}

Case recycle_case(DataType type, bool paper) {
  Case c{{{"keep", 3}, {"pool", 6}, {"clusters", 2}, {"paper", paper}}, 0, {}, {}};
  c.inputs = {Tensor(type, shape({2, 12, 6})), Tensor(DataType::kFLOAT, shape({2, 12}))};
  fill(c.inputs[0]);
  fill(c.inputs[1]);
  c.expected = {Tensor(type, shape({2, 2, 6})), Tensor(DataType::kINT32, shape({2, 2})),
                Tensor(DataType::kINT32, shape({2, 12}))};
  vtexport::cpu::token_recycle({2, 12, 6, 3, 6, 2, paper, element(type)}, c.inputs[0].bytes.data(),
                               c.inputs[1].as<float>(), c.expected[0].bytes.data(), c.expected[1].as<int32_t>(),
                               c.expected[2].as<int32_t>());
  return c;
}

template <typename T>
T* capability(IPluginV3* plugin, PluginCapabilityType type) {
  return static_cast<T*>(plugin->getCapabilityInterface(type));
}

IPluginV3* create(IPluginCreatorV3One* creator, const Case& c, bool wide, int leave_out = -1) {
  std::vector<int32_t> narrow;
  std::vector<PluginField> fields;
  for (const auto& [name, value] : c.integers) narrow.push_back(static_cast<int32_t>(value));
  for (size_t i = 0; i < c.integers.size(); ++i) {
    if (static_cast<int>(i) == leave_out) continue;
    if (wide) fields.emplace_back(c.integers[i].first, &c.integers[i].second, PluginFieldType::kINT64, 1);
    if (!wide) fields.emplace_back(c.integers[i].first, &narrow[i], PluginFieldType::kINT32, 1);
  }
  if (c.scale != 0) fields.emplace_back("scale", &c.scale, PluginFieldType::kFLOAT32, 1);
  fields.emplace_back("plugin_namespace", "", PluginFieldType::kCHAR, 0);  // what parsers add
  const PluginFieldCollection collection{static_cast<int32_t>(fields.size()), fields.data()};
  return creator->createPlugin("layer", &collection, TensorRTPhase::kBUILD);
}

void run(IPluginV3* plugin, Case& c, const std::string& name) {
  auto* build = capability<v_1_0::IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
  auto* runtime = capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
  const int inputs = static_cast<int>(c.inputs.size()), outputs = static_cast<int>(c.expected.size());
  expect(build->getNbOutputs() == outputs, name + ": number of outputs");

  std::vector<DataType> input_types, types(outputs);
  for (auto& tensor : c.inputs) input_types.push_back(tensor.type);
  expect(build->getOutputDataTypes(types.data(), outputs, input_types.data(), inputs) == 0, name + ": output types");
  expect(build->getOutputDataTypes(types.data(), outputs, input_types.data(), inputs + 1) != 0, name + ": too many inputs");

  Builder builder;
  std::vector<DimsExprs> exprs(inputs), found(outputs);
  for (int i = 0; i < inputs; ++i) {
    exprs[i].nbDims = c.inputs[i].dims.nbDims;
    for (int d = 0; d < exprs[i].nbDims; ++d) exprs[i].d[d] = builder.constant(c.inputs[i].dims.d[d]);
  }
  expect(build->getOutputShapes(exprs.data(), inputs, nullptr, 0, found.data(), outputs, builder) == 0, name + ": shapes");
  for (int i = 0; i < outputs; ++i) {
    expect(types[i] == c.expected[i].type, name + ": type of an output");
    expect(found[i].nbDims == c.expected[i].dims.nbDims, name + ": rank of an output");
    for (int d = 0; d < found[i].nbDims; ++d) {
      expect(found[i].d[d]->getConstantValue() == c.expected[i].dims.d[d], name + ": extent of an output");
    }
  }

  std::vector<DynamicPluginTensorDesc> all(inputs + outputs);
  std::vector<PluginTensorDesc> in, out;
  for (int i = 0; i < inputs + outputs; ++i) {
    const Tensor& tensor = i < inputs ? c.inputs[i] : c.expected[i - inputs];
    all[i].desc = tensor.desc();
    all[i].min = all[i].opt = all[i].max = tensor.dims;
    (i < inputs ? in : out).push_back(tensor.desc());
  }
  for (int i = 0; i < inputs + outputs; ++i) {
    expect(build->supportsFormatCombination(i, all.data(), inputs, outputs), name + ": its own format");
    auto changed = all;
    changed[i].desc.format = TensorFormat::kCHW32;
    expect(!build->supportsFormatCombination(i, changed.data(), inputs, outputs), name + ": a vectorised format");
    changed = all;
    changed[i].desc.type = DataType::kINT8;
    expect(!build->supportsFormatCombination(i, changed.data(), inputs, outputs), name + ": int8");
  }
  expect(!build->supportsFormatCombination(inputs + outputs, all.data(), inputs, outputs), name + ": a place outside");
  expect(std::strlen(build->getTimingCacheID()) > 0, name + ": timing cache id");
  expect(build->configurePlugin(all.data(), inputs, all.data() + inputs, outputs) == 0, name + ": configure");
  std::vector<char> scratch(build->getWorkspaceSize(all.data(), inputs, all.data() + inputs, outputs) + 1);
  Place workspace(scratch);

  expect(runtime->onShapeChange(in.data(), inputs, out.data(), outputs) == 0, name + ": shapes at run time");
  std::vector<Tensor> results;
  for (auto& tensor : c.expected) results.emplace_back(tensor.type, tensor.dims);
  std::vector<Place> sources, sinks;
  std::vector<const void*> from;
  std::vector<void*> to;
  for (auto& tensor : c.inputs) from.push_back(sources.emplace_back(tensor.bytes).get());
  for (auto& tensor : results) to.push_back(sinks.emplace_back(tensor.bytes).get());
  std::vector<std::vector<char>> before_again(outputs);
  for (int again = 0; again < 2; ++again) {
    const int32_t status = runtime->enqueue(in.data(), out.data(), from.data(), to.data(), workspace.get(), nullptr);
    expect(status == 0, name + ": enqueue");
    for (int i = 0; i < outputs; ++i) {
      sinks[i].read_back();
      expect(same(results[i], c.expected[i], c.inputs[0].type), name + ": results");
      expect(again == 0 || results[i].bytes == before_again[i], name + ": two runs differ");
      before_again[i] = results[i].bytes;
    }
  }

  // One line to the log for each: a missing input, a misaligned one, shapes that no kernel takes.
  const int before = logger.lines;
  auto missing = from;
  missing[1] = nullptr;
  expect(runtime->enqueue(in.data(), out.data(), missing.data(), to.data(), workspace.get(), nullptr) != 0, name + ": no input");
  missing[1] = static_cast<const char*>(from[1]) + 1;
  expect(runtime->enqueue(in.data(), out.data(), missing.data(), to.data(), workspace.get(), nullptr) != 0,
         name + ": misaligned input");
  auto odd = in;
  for (auto& tensor : odd) tensor.dims.d[1] = 1;
  odd[0].dims.d[1] = odd.size() == 2 ? 1 : 3;
  odd[1].dims.d[1] = 2;
  expect(runtime->onShapeChange(odd.data(), inputs, out.data(), outputs) != 0, name + ": impossible shapes");
  expect(logger.lines == before + 3, name + ": errors are logged");
}

}  // namespace

int main(int count, char** arguments) {
  on_device = count > 2 && std::string(arguments[2]) == "--device";
  void* library = dlopen(arguments[1], RTLD_NOW | RTLD_LOCAL);
  expect(library != nullptr, std::string("dlopen: ") + (library == nullptr ? dlerror() : ""));
  auto get = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(library, "getCreators"));
  auto set = reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(library, "setLoggerFinder"));
  expect(get != nullptr && set != nullptr, "the library's two functions");
  set(&finder);
  int32_t number = 0;
  IPluginCreatorInterface* const* creators = get(number);
  expect(number == 4, "four creators");
  for (DataType type : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16}) {
    for (int i = 0; i < number; ++i) {
      auto* creator = static_cast<IPluginCreatorV3One*>(creators[i]);
      const std::string name = creator->getPluginName();
      for (bool paper : {false, true}) {
        Case c = name == "TokenSelect"    ? select_case(type)
                 : name == "TokenRecycle" ? recycle_case(type, paper)
                                          : score_case(type, name == "TokenScoreHeads");
        expect(std::string(creator->getPluginVersion()) == "1", name + ": version");
        for (size_t a = 0; a < c.integers.size(); ++a) {
          expect(create(creator, c, false, static_cast<int>(a)) == nullptr, name + ": an attribute is missing");
        }
        for (bool wide : {false, true}) {
          std::unique_ptr<IPluginV3> plugin(create(creator, c, wide));
          expect(plugin != nullptr, name + ": created");
          run(plugin.get(), c, name);
          std::unique_ptr<IPluginV3> copy(plugin->clone());
          auto* runtime = capability<IPluginV3OneRuntime>(plugin.get(), PluginCapabilityType::kRUNTIME);
          std::unique_ptr<IPluginV3> again(
              creator->createPlugin("layer", runtime->getFieldsToSerialize(), TensorRTPhase::kRUNTIME));
          std::unique_ptr<IPluginV3> attached(runtime->attachToContext(nullptr));
          plugin.reset();
          expect(copy != nullptr && again != nullptr && attached != nullptr, name + ": copies");
          for (IPluginV3* other : {copy.get(), again.get(), attached.get()}) run(other, c, name + ", a copy");
        }
      }
    }
  }
  std::puts("all plugins passed");
  return 0;
}
