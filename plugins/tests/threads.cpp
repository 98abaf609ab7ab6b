// Many threads load, create, copy and run the plugins over the CPU twins at once, under ThreadSanitizer, which ends the
// program with a status of its own where two of them use the same memory unordered. Each context of an engine has a copy of
// its plugins and may run on a thread of its own; here they share inputs, as contexts share weights.
//   threads          every op
//   threads --race   a copy that all threads share writes to one array: must be found
#include <NvInferRuntime.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "tensorrt/ops.h"

extern "C" nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& number);
extern "C" void setLoggerFinder(nvinfer1::ILoggerFinder* finder);

namespace {

using namespace nvinfer1;
using vtexport::trt::Kind;
using vtexport::trt::kOps;
using vtexport::trt::Op;

constexpr int kThreads = 4, kRounds = 25;

void expect(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

struct Logger : ILogger {
  std::atomic<int> lines{0};
  void log(Severity, const AsciiChar*) noexcept override { ++lines; }
} logger;

struct Finder : ILoggerFinder {
  ILogger* findLogger() override { return &logger; }
} finder;

// Batch 2, four heads of two key heads, three rows, seven keys, size and width 5, four columns; eight tokens, of which
// three are kept and four are merged into two.
int64_t extent(const Op& op, char letter) {
  const bool scores = op.input[0].shape[1] == 'h';
  switch (letter) {
    case 'b': return 2;
    case 'h': return 4;
    case 'g': return 2;
    case 'r': return 3;
    case 'k': return scores ? 7 : 3;
    case 'd': case 'w': return 5;
    case 'v': case 'p': return 4;
    case 't': return 8;
    default: return 2;  // clusters
  }
}

struct Tensor {
  PluginTensorDesc desc{};
  std::vector<int64_t> words;  // aligned for every type
};

Tensor tensor(const Dims& dims, Kind kind) {
  Tensor made;
  made.desc.dims = dims;
  made.desc.format = TensorFormat::kLINEAR;
  made.desc.type = kind == Kind::kInt32 ? DataType::kINT32 : kind == Kind::kInt64 ? DataType::kINT64 : DataType::kFLOAT;
  size_t elements = 1;
  for (int d = 0; d < dims.nbDims; ++d) elements *= static_cast<size_t>(dims.d[d]);
  made.words.resize(elements);  // at least as many bytes as the type takes
  for (size_t i = 0; i < elements; ++i) {
    const float real = 0.5f + static_cast<float>(i * 7 % 11);
    const int32_t whole = static_cast<int32_t>(i * 5 % 8);
    char* bytes = reinterpret_cast<char*>(made.words.data());
    if (kind == Kind::kInt64) made.words[i] = static_cast<int64_t>(i % 3);
    if (kind == Kind::kInt32) std::memcpy(bytes + i * 4, &whole, 4);
    if (kind == Kind::kElement || kind == Kind::kFloat32) std::memcpy(bytes + i * 4, &real, 4);
  }
  return made;
}

struct Inputs {
  std::vector<PluginTensorDesc> descs;
  std::vector<Tensor> tensors;
  std::vector<const void*> places;

  explicit Inputs(const Op& op) {
    for (int i = 0; i < op.inputs; ++i) {
      Dims dims{op.input[i].dimensions(), {}};
      for (int d = 0; d < dims.nbDims; ++d) dims.d[d] = extent(op, op.input[i].shape[d]);
      tensors.push_back(tensor(dims, op.input[i].kind));
      descs.push_back(tensors.back().desc);
    }
    for (const Tensor& one : tensors) places.push_back(one.words.data());
  }
};

std::vector<Tensor> outputs(const Op& op, const Inputs& inputs) {
  std::vector<Tensor> made;
  for (int i = 0; i < op.outputs; ++i) {
    Dims dims{op.output[i].dimensions, {}};
    for (int d = 0; d < dims.nbDims; ++d) {
      const vtexport::trt::Extent from = op.output[i].extents[static_cast<size_t>(d)];
      dims.d[d] = inputs.descs[static_cast<size_t>(from.input)].dims.d[from.axis];
    }
    made.push_back(tensor(dims, op.output[i].kind));
  }
  return made;
}

IPluginV3* create(int number) {
  int32_t count = 0;
  auto* creator = static_cast<IPluginCreatorV3One*>(getCreators(count)[number]);
  const float scale = 0.3f;
  const int32_t heads = 2, paper = 1;
  const PluginField fields[] = {PluginField("scale", &scale, PluginFieldType::kFLOAT32, 1),
                                PluginField("heads", &heads, PluginFieldType::kINT32, 1),
                                PluginField("paper", &paper, PluginFieldType::kINT32, 1)};
  const PluginFieldCollection collection{3, fields}, none{0, nullptr};
  if (number != vtexport::trt::kSelect) {
    expect(creator->createPlugin("none", &none, TensorRTPhase::kBUILD) == nullptr, "created without attributes");
  }
  return creator->createPlugin("layer", &collection, TensorRTPhase::kBUILD);
}

void run(IPluginV3* plugin, const Op& op, const Inputs& inputs, std::vector<Tensor>& to) {
  auto* runtime = static_cast<IPluginV3OneRuntime*>(plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
  std::vector<PluginTensorDesc> out;
  std::vector<void*> places;
  for (Tensor& one : to) out.push_back(one.desc), places.push_back(one.words.data());
  expect(runtime->onShapeChange(inputs.descs.data(), op.inputs, out.data(), op.outputs) == 0, "shapes");
  expect(runtime->enqueue(inputs.descs.data(), out.data(), inputs.places.data(), places.data(), nullptr, nullptr) == 0,
         "enqueue");
}

// One thread: plugins of its own, and copies of one that all threads have.
void work(int number, const Inputs& inputs, IPluginV3* shared, const std::vector<Tensor>& expected) {
  const Op& op = kOps[static_cast<size_t>(number)];
  for (int round = 0; round < kRounds; ++round) {
    setLoggerFinder(&finder);
    std::unique_ptr<IPluginV3> own(create(number)), copy(shared->clone());
    for (IPluginV3* plugin : {own.get(), copy.get()}) {
      std::vector<Tensor> found = outputs(op, inputs);
      run(plugin, op, inputs, found);
      for (size_t i = 0; i < found.size(); ++i) expect(found[i].words == expected[i].words, "threads differ");
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  const bool race = count > 1 && std::string(arguments[1]) == "--race";
  setLoggerFinder(&finder);
  for (int number = 0; number < static_cast<int>(kOps.size()); ++number) {
    const Op& op = kOps[static_cast<size_t>(number)];
    const Inputs inputs(op);
    std::unique_ptr<IPluginV3> shared(create(number));
    std::vector<Tensor> expected = outputs(op, inputs);
    run(shared.get(), op, inputs, expected);
    std::vector<Tensor> one = expected;
    std::vector<std::thread> threads;
    for (int t = 0; t < kThreads; ++t) {
      threads.emplace_back([&] { race ? run(shared.get(), op, inputs, one) : work(number, inputs, shared.get(), expected); });
    }
    for (std::thread& thread : threads) thread.join();
  }
  expect(race || logger.lines == 3 * (1 + kThreads * kRounds), "errors are logged");
  std::puts("no races");
  return 0;
}
