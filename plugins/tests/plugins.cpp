// Drives every plugin of a library as TensorRT would, without TensorRT: creators, attributes, clones, serialisation, types,
// shapes, formats, workspace, and enqueue against the CPU twins.
//   drive_plugins LIBRARY            over the twins themselves, or over emulated kernels: enqueue takes host pointers
//   drive_plugins LIBRARY --device   over the CUDA kernels, on a GPU: enqueue takes device pointers
//   drive_plugins LIBRARY --bf16     one type only
//   drive_plugins LIBRARY --large    problems of LLaVA-1.5-7B's size only
//   drive_plugins LIBRARY --launches one problem of each op, whose launches are counted and printed
//   drive_plugins LIBRARY --ops      nothing is driven: the table of ops is printed
// Runs must give the same bits; emulated kernels run in a new order each time, and workspaces begin with new random contents.
#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <algorithm>
#include <cmath>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/number.h"
#include "shapes.h"
#include "tensorrt/ops.h"

namespace {

using namespace nvinfer1;
using vtexport::trt::Builder;
using vtexport::trt::Number;

void expect(bool holds, const std::string& what) {
  if (holds) return;
  std::fprintf(stderr, "failed: %s\n", what.c_str());
  std::exit(1);
}

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
    size_t size = t == DataType::kINT64 ? 8 : t == DataType::kFLOAT || t == DataType::kINT32 ? 4 : 2;
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

// fp16 numbers near one of either sign; the exponents are chosen so that every bit pattern is a number.
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
void (*emulate)(int order) = nullptr;  // set if the library's kernels are emulated, as is the next one
int (*launches)() = nullptr;

// Bytes where enqueue reads and writes them: a device buffer, or the tensor's own.
class Place {
 public:
  explicit Place(std::vector<char>& bytes) : bytes_(bytes) {
    if (!on_device) return;
    // Never empty; compute-sanitizer finds accesses out of bounds.
    expect(cudaMalloc(&memory_, bytes.size() + 1) == cudaSuccess, "cudaMalloc");
    write();
  }
  Place(Place&& other) noexcept : bytes_(other.bytes_), memory_(other.memory_) { other.memory_ = nullptr; }
  ~Place() {
    if (memory_ != nullptr) cudaFree(memory_);
  }
  void* get() { return on_device ? memory_ : bytes_.data(); }
  void write() {
    if (!on_device) return;
    expect(cudaMemcpy(memory_, bytes_.data(), bytes_.size(), cudaMemcpyHostToDevice) == cudaSuccess, "copy to the device");
  }
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

// Integers must be equal; elements may differ by another order of summation or one rounding to their type, and scores,
// which are small and fp32 whatever the elements are, by another order of summation. Tensor cores of a GPU round sums
// towards zero.
bool same(const Tensor& found, const Tensor& expected, bool scores) {
  const bool twins = !on_device && emulate == nullptr;
  if (twins || expected.type == DataType::kINT32) return found.bytes == expected.bytes;
  const float exact = scores && on_device ? 1e-4f : 1e-5f;
  const float allowed = expected.type == DataType::kFLOAT ? exact : expected.type == DataType::kHALF ? 2e-3f : 1e-2f;
  const size_t count = found.bytes.size() / (found.type == DataType::kFLOAT ? 4 : 2);
  for (size_t i = 0; i < count; ++i) {
    const float a = number(found, i), b = number(expected, i);
    if (!(std::fabs(a - b) <= allowed * ((scores ? 1e-3f : 1.0f) + std::fabs(b)))) return false;
  }
  return true;
}

// A number of tokens, as the ops take it: a vector of that length, whose values are not read.
Tensor slots(int32_t number) {
  Tensor made(DataType::kINT32, shape({number}));
  std::fill(made.bytes.begin(), made.bytes.end(), static_cast<char>(0x7f));
  return made;
}

struct Case {
  std::vector<std::pair<const char*, int64_t>> integers;
  float scale;  // 0: the op has no scale
  int most_launches;
  std::vector<Tensor> inputs, expected;
};

Case score_case(const vtexport::ScoreProblem& p) {
  const DataType type = p.type == vtexport::DType::kFloat32   ? DataType::kFLOAT
                        : p.type == vtexport::DType::kFloat16 ? DataType::kHALF
                                                              : DataType::kBF16;
  Case c{{}, p.scale, 3, {}, {}};
  c.inputs = {Tensor(type, shape({p.batch, p.heads, p.rows, p.size})), Tensor(type, shape({p.batch, p.kv_heads, p.keys, p.size})),
              Tensor(DataType::kINT64, shape({p.batch, p.rows})), Tensor(DataType::kINT64, shape({p.batch}))};
  fill(c.inputs[0]);
  fill(c.inputs[1]);
  for (int i = 0; i < p.batch * p.rows; ++i) {
    // Some rows do not count, in some batches none; some see more than there is.
    const bool counts = i % 3 != 1 && i % 11 != 10 && (p.batch == 1 || i >= p.rows || p.rows < 5);
    const int64_t last = i % 13 == 12 ? p.keys + i : p.keys - 1 - i % p.keys / 2;
    c.inputs[2].as<int64_t>()[i] = counts ? last : -1 - i % 2 * INT64_C(5000000000);
  }
  for (int i = 0; i < p.batch; ++i) c.inputs[3].as<int64_t>()[i] = (p.keys - p.visual) / (1 + i);
  if (p.best_heads > 0) {
    c.integers.push_back({"heads", p.best_heads});
    c.inputs.emplace_back(DataType::kFLOAT, shape({p.batch, p.rows, p.visual}));
    for (size_t i = 0; i < c.inputs[4].count<float>(); ++i) c.inputs[4].as<float>()[i] = 1.0f + static_cast<float>(i % 4);
  }
  c.inputs.push_back(slots(p.visual));
  c.expected = {Tensor(DataType::kFLOAT, shape({p.batch, p.visual}))};
  vtexport::cpu::token_score(p, c.inputs[0].bytes.data(), c.inputs[1].bytes.data(), c.inputs[2].as<int64_t>(),
                             c.inputs[3].as<int64_t>(), p.best_heads > 0 ? c.inputs[4].as<float>() : nullptr,
                             c.expected[0].as<float>());
  return c;
}

Case select_case(DataType type, const vtexport::SelectProblem& p) {
  Case c{{}, 0, 1, {}, {}};
  c.inputs = {Tensor(type, shape({p.batch, p.tokens, p.width})), Tensor(DataType::kFLOAT, shape({p.batch, p.tokens})),
              slots(p.keep)};
  fill(c.inputs[0]);
  fill(c.inputs[1]);
  for (size_t i = 0; i < c.inputs[1].count<float>(); ++i) {
    float& score = c.inputs[1].as<float>()[i];
    if (i % 5 == 0) score = i % 2 == 0 ? 0.5f : NAN;
    if (p.batch > 2) score = std::round(score);  // few different scores, among them two zeros
  }
  c.expected = {Tensor(type, shape({p.batch, p.keep, p.width})), Tensor(DataType::kINT32, shape({p.batch, p.keep})),
                Tensor(DataType::kINT32, shape({p.batch, p.tokens}))};
  vtexport::cpu::token_select(p, c.inputs[0].bytes.data(), c.inputs[1].as<float>(), c.expected[0].bytes.data(),
                              c.expected[1].as<int32_t>(), c.expected[2].as<int32_t>());
  return c;
}

// With `sound` ranks are a permutation; else any numbers, which may not lead out of the arrays either.
Case recycle_case(DataType type, const vtexport::RecycleProblem& p, bool sound = true) {
  Case c{{{"paper", p.paper}}, 0, p.pool > 256 ? 4 : 3, {}, {}};
  c.inputs = {Tensor(type, shape({p.batch, p.tokens, p.width})), Tensor(DataType::kINT32, shape({p.batch, p.tokens})),
              slots(p.keep), slots(p.pool), slots(p.clusters)};
  fill(c.inputs[0]);
  for (int b = 0; b < p.batch; ++b) {
    int32_t* rank = c.inputs[1].as<int32_t>() + static_cast<size_t>(b) * p.tokens;
    std::iota(rank, rank + p.tokens, 0);
    std::shuffle(rank, rank + p.tokens, generator);
    // Too many tokens for the pool in one row of the batch, too few in the next, and ranks far from any.
    for (int v = 0; v < p.tokens && !sound; ++v) rank[v] = v % 3 == 0 ? INT32_MIN : b % 2 == 0 ? p.keep : INT32_MAX - v % 2;
  }
  // Some tokens are equal: their distance is exactly zero, however it is computed.
  const size_t row = c.inputs[0].bytes.size() / (static_cast<size_t>(p.batch) * p.tokens);
  for (size_t i = 7; i < static_cast<size_t>(p.tokens); i += 9) {
    std::memcpy(&c.inputs[0].bytes[i * row], &c.inputs[0].bytes[(i - 4) * row], row);
  }
  c.expected = {Tensor(type, shape({p.batch, p.clusters, p.width})), Tensor(DataType::kINT32, shape({p.batch, p.clusters})),
                Tensor(DataType::kINT32, shape({p.batch, p.tokens}))};
  vtexport::cpu::token_recycle(p, c.inputs[0].bytes.data(), c.inputs[1].as<int32_t>(), c.expected[0].bytes.data(),
                               c.expected[1].as<int32_t>(), c.expected[2].as<int32_t>());
  return c;
}

// Problems that take every path through the kernels: one tile and several, whole vectors and odd widths.
std::vector<Case> cases(const std::string& name, DataType type) {
  const vtexport::DType e = element(type);
  if (name == "TokenSelect") {
    return {select_case(type, {2, 9, 6, 4, e}), select_case(type, {1, 300, 40, 137, e}), select_case(type, {2, 70, 33, 70, e}),
            select_case(type, {40, 30, 7, 17, e}), select_case(type, {1, 2, 8, 2, e})};
  }
  if (name == "TokenRecycle") {
    return {recycle_case(type, {2, 12, 6, 3, 6, 2, false, e}), recycle_case(type, {2, 12, 6, 3, 6, 2, true, e}),
            recycle_case(type, {1, 300, 2504, 20, 130, 9, false, e}), recycle_case(type, {1, 70, 131, 0, 70, 7, false, e}),
            recycle_case(type, {1, 60, 131, 10, 45, 40, true, e}), recycle_case(type, {2, 30, 20, 5, 12, 3, false, e}, false),
            recycle_case(type, {2, 30, 20, 5, 12, 3, true, e}, false), recycle_case(type, {40, 9, 300, 2, 5, 2, false, e}),
            recycle_case(type, {1, 310, 72, 10, 290, 29, false, e}), recycle_case(type, {1, 3, 5, 0, 3, 3, false, e})};
  }
  const int best = name == "TokenScoreHeads" ? 2 : 0;
  return {score_case({2, 4, 2, 3, 11, 8, 5, 0.35f, best, e}), score_case({2, 2, 2, 25, 150, 32, 100, 0.125f, best, e}),
          score_case({1, 4, 1, 1, 145, 20, 144, 0.2f, best, e}), score_case({1, 2, 1, 95, 420, 40, 390, 0.15f, best, e}),
          score_case({1, 2, 2, 2, 13000, 8, 45, 0.3f, best, e}), score_case({1, 2, 1, 20, 1700, 16, 900, 0.2f, best, e})};
}

// SparseVLM's first stage in LLaVA-1.5-7B: all visual tokens in, rated by 64 text tokens.
std::vector<Case> large_cases(const std::string& name, DataType type) {
  if (name == "TokenSelect") return {select_case(type, {1, 576, 4096, 150, element(type)})};
  if (name == "TokenRecycle") {
    // Also a pool whose last launch has more tokens than threads, by the paper's way.
    return {recycle_case(type, {1, 576, 4096, 150, 130, 14, false, element(type)}),
            recycle_case(type, {1, 900, 64, 150, 700, 70, true, element(type)})};
  }
  return {score_case({1, 32, 32, 64, 640, 128, 576, 0.0884f, name == "TokenScoreHeads" ? 16 : 0, element(type)})};
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

constexpr int kRuns = 3;  // of enqueue

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
  for (int again = 0; again < kRuns; ++again) {
    if (emulate != nullptr) emulate(again);
    for (char& byte : scratch) byte = static_cast<char>(generator());
    workspace.write();
    const int launched = launches == nullptr ? 0 : launches();
    const int32_t status = runtime->enqueue(in.data(), out.data(), from.data(), to.data(), workspace.get(), nullptr);
    expect(status == 0, name + ": enqueue");
    expect(launches == nullptr || launches() - launched <= c.most_launches, name + ": launches");
    for (int i = 0; i < outputs; ++i) {
      sinks[i].read_back();
      expect(same(results[i], c.expected[i], c.scale != 0), name + ": results");
      expect(again == 0 || results[i].bytes == before_again[i], name + ": runs differ");
      before_again[i] = results[i].bytes;
    }
  }

  // A profile that asks for no tokens: nothing is read or written, wherever the inputs are.
  auto none = in;
  none.back().dims.d[0] = 0;
  expect(runtime->onShapeChange(none.data(), inputs, out.data(), outputs) == 0, name + ": shapes without tokens");
  const std::vector<const void*> nowhere(inputs, nullptr);
  const std::vector<void*> into_nowhere(outputs, nullptr);
  const int quiet = launches == nullptr ? 0 : launches();
  expect(runtime->enqueue(none.data(), out.data(), nowhere.data(), into_nowhere.data(), nullptr, nullptr) == 0,
         name + ": enqueue without tokens");
  expect(launches == nullptr || launches() == quiet, name + ": launches without tokens");

  // One line to the log for each: a missing input, a misaligned one, shapes that no kernel takes.
  const int before = logger.lines;
  auto missing = from;
  missing[1] = nullptr;
  expect(runtime->enqueue(in.data(), out.data(), missing.data(), to.data(), workspace.get(), nullptr) != 0, name + ": no input");
  missing[1] = static_cast<const char*>(from[1]) + 1;
  expect(runtime->enqueue(in.data(), out.data(), missing.data(), to.data(), workspace.get(), nullptr) != 0,
         name + ": misaligned input");
  auto odd = in;
  // More tokens kept than there are, more clusters than tokens in the pool, heads that do not fit.
  if (name.rfind("TokenSelect", 0) == 0) odd[2].dims.d[0] = in[0].dims.d[1] + 1;
  if (name.rfind("TokenRecycle", 0) == 0) odd[4].dims.d[0] = in[3].dims.d[0] + 1;
  if (name.rfind("TokenScore", 0) == 0) odd[0].dims.d[1] = 3, odd[1].dims.d[1] = 2;
  expect(runtime->onShapeChange(odd.data(), inputs, out.data(), outputs) != 0, name + ": impossible shapes");
  expect(logger.lines == before + 3, name + ": errors are logged");
}

template <typename Entries>
std::string names(const Entries& entries, int count) {
  std::string found;
  for (int i = 0; i < count; ++i) found += (i == 0 ? "" : " ") + std::string(entries[i].name);
  return found;
}

}  // namespace

int main(int count, char** arguments) {
  const std::string option = count > 2 ? arguments[2] : "";
  if (option == "--ops") {
    for (const vtexport::trt::Op& op : vtexport::trt::kOps) {
      std::printf("%s|%s|%s|%s\n", op.name, names(op.input, op.inputs).c_str(),
                  names(op.attribute, op.attributes).c_str(), names(op.output, op.outputs).c_str());
    }
    return 0;
  }
  on_device = option == "--device";
  void* library = dlopen(arguments[1], RTLD_NOW | RTLD_LOCAL);
  expect(library != nullptr, std::string("dlopen: ") + (library == nullptr ? dlerror() : ""));
  auto get = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(library, "getCreators"));
  auto set = reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(library, "setLoggerFinder"));
  expect(get != nullptr && set != nullptr, "the library's two functions");
  set(&finder);
  emulate = reinterpret_cast<void (*)(int)>(dlsym(library, "vtexport_emulate"));
  launches = reinterpret_cast<int (*)()>(dlsym(library, "vtexport_launches"));
  int32_t number = 0;
  IPluginCreatorInterface* const* creators = get(number);
  expect(number == 4, "four creators");
  if (option == "--launches") {
    for (int i = 0; i < number; ++i) {
      auto* creator = static_cast<IPluginCreatorV3One*>(creators[i]);
      const std::string name = creator->getPluginName();
      // Of TokenScore, one whose rows and keys fill more than one block.
      Case c = name == "TokenScore" || name == "TokenScoreHeads" ? cases(name, DataType::kHALF)[3]
                                                                 : cases(name, DataType::kHALF)[0];
      std::unique_ptr<IPluginV3> plugin(create(creator, c, false));
      const int before = launches();
      run(plugin.get(), c, name);
      std::printf("%s %d\n", name.c_str(), (launches() - before) / kRuns);
    }
    return 0;
  }
  const std::pair<const char*, DataType> types[] = {
      {"--fp32", DataType::kFLOAT}, {"--fp16", DataType::kHALF}, {"--bf16", DataType::kBF16}};
  const bool all = std::none_of(std::begin(types), std::end(types), [&](auto& one) { return option == one.first; });
  for (auto& [flag, type] : types) {
    if (!all && option != flag) continue;
    for (int i = 0; i < number; ++i) {
      auto* creator = static_cast<IPluginCreatorV3One*>(creators[i]);
      const std::string name = creator->getPluginName();
      for (Case& c : option == "--large" ? large_cases(name, type) : cases(name, type)) {
        expect(std::string(creator->getPluginVersion()) == "2", name + ": version");
        for (size_t a = 0; a < c.integers.size(); ++a) {
          expect(create(creator, c, false, static_cast<int>(a)) == nullptr, name + ": an attribute is missing");
        }
        for (bool wide : {false, true}) {
          std::unique_ptr<IPluginV3> plugin(create(creator, c, wide));
          expect(plugin != nullptr, name + ": created");
          if (emulate != nullptr && wide) continue;  // too slow to run twice
          run(plugin.get(), c, name);
          std::unique_ptr<IPluginV3> copy(plugin->clone());
          auto* runtime = capability<IPluginV3OneRuntime>(plugin.get(), PluginCapabilityType::kRUNTIME);
          std::unique_ptr<IPluginV3> again(
              creator->createPlugin("layer", runtime->getFieldsToSerialize(), TensorRTPhase::kRUNTIME));
          std::unique_ptr<IPluginV3> attached(runtime->attachToContext(nullptr));
          plugin.reset();
          expect(copy != nullptr && again != nullptr && attached != nullptr, name + ": copies");
          for (IPluginV3* other : {copy.get(), again.get(), attached.get()}) {
            if (emulate == nullptr) run(other, c, name + ", a copy");
          }
        }
      }
    }
  }
  std::puts("all plugins passed");
  return 0;
}
