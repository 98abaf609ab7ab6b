// The CUDA kernels on threads of the operating system (plugins/tests/emulator/threads.h), under ThreadSanitizer, which ends
// the program with a status of its own where two threads of a block use the same memory and no barrier stands between.
//   races               every op on small problems
//   races --block       a kernel that lacks a barrier of the block: must be found
//   races --warp        one that lacks a barrier of the warp, where a shuffle stands: must be found
//   races --sound       the same with both barriers
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cpu/number.h"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"

namespace vtexport::cuda {

// Each thread reads what another wrote: one of the same warp and one of the other.
__global__ void exchange(float* out, bool block_waits, bool warp_waits) {
  __shared__ float numbers[64], more[64];
  const unsigned thread = threadIdx.x;
  more[thread] = static_cast<float>(thread);
  const float sum = __shfl_xor_sync(0xFFFFFFFFu, static_cast<float>(thread), 1);
  if (warp_waits) __syncwarp();
  numbers[thread] = sum + more[thread ^ 1];
  if (block_waits) __syncthreads();
  out[thread] = numbers[63 - thread];
}

}  // namespace vtexport::cuda

namespace {

using vtexport::DType;

std::mt19937 generator(3);

std::vector<char> elements(DType type, size_t count) {
  std::vector<char> bytes(count * vtexport::size_of(type));
  std::normal_distribution<float> normal;
  for (size_t i = 0; i < count; ++i) {
    char* place = bytes.data() + i * vtexport::size_of(type);
    if (type == DType::kFloat32) vtexport::cpu::store(normal(generator), *reinterpret_cast<float*>(place));
    if (type == DType::kFloat16) vtexport::cpu::store(normal(generator), *reinterpret_cast<vtexport::cpu::Float16*>(place));
    if (type == DType::kBFloat16) vtexport::cpu::store(normal(generator), *reinterpret_cast<vtexport::cpu::BFloat16*>(place));
  }
  return bytes;
}

void expect(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

void score(const vtexport::ScoreProblem& p) {
  const auto query = elements(p.type, static_cast<size_t>(p.heads) * p.rows * p.size);
  const auto key = elements(p.type, static_cast<size_t>(p.kv_heads) * p.keys * p.size);
  std::vector<int64_t> places(p.rows);
  for (int32_t r = 0; r < p.rows; ++r) places[r] = r % 3 == 1 ? -1 : p.keys - 1 - r;
  const int64_t start = 2;
  const std::vector<float> divisor(static_cast<size_t>(p.rows) * p.visual, 2.0f);
  std::vector<float> found(p.visual);
  std::vector<char> workspace(vtexport::cuda::workspace_size(p) + 1);
  expect(vtexport::cuda::token_score(p, query.data(), key.data(), places.data(), &start,
                                     p.best_heads > 0 ? divisor.data() : nullptr, found.data(), workspace.data(), nullptr),
         "TokenScore");
}

std::vector<int32_t> select(const vtexport::SelectProblem& p, const std::vector<char>& hidden) {
  std::vector<float> score(p.tokens);
  for (float& one : score) one = static_cast<float>(generator() % 20);
  std::vector<char> kept(static_cast<size_t>(p.keep) * p.width * vtexport::size_of(p.type));
  std::vector<int32_t> index(p.keep), rank(p.tokens);
  expect(vtexport::cuda::token_select(p, hidden.data(), score.data(), kept.data(), index.data(), rank.data(), nullptr, nullptr),
         "TokenSelect");
  return rank;
}

void recycle(const vtexport::RecycleProblem& p, const std::vector<char>& hidden, const std::vector<int32_t>& rank) {
  std::vector<char> merged(static_cast<size_t>(p.clusters) * p.width * vtexport::size_of(p.type));
  std::vector<int32_t> centres(p.clusters), cluster(p.tokens);
  std::vector<char> workspace(vtexport::cuda::workspace_size(p) + 1);
  expect(vtexport::cuda::token_recycle(p, hidden.data(), rank.data(), merged.data(), centres.data(), cluster.data(),
                                       workspace.data(), nullptr),
         "TokenRecycle");
}

}  // namespace

int main(int count, char** arguments) {
  const std::string option = count > 1 ? arguments[1] : "";
  if (!option.empty()) {
    std::vector<float> out(64);
    vtexport::cuda::Launcher on(nullptr);
    on.run(vtexport::cuda::exchange, dim3(1), 64, 0, out.data(), option != "--block", option != "--warp");
    expect(on.error(), "a launch");
  } else {
    for (DType type : {DType::kFloat16, DType::kFloat32}) {
      // One block per head, and a cluster of them.
      score({1, 2, 1, 5, 70, 16, 40, 0.3f, 1, type});
      score({1, 1, 1, 18, 400, 8, 40, 0.3f, 0, type});
      const int32_t tokens = 75, width = 40, keep = 20, pool = 36, clusters = 4;
      const auto hidden = elements(type, static_cast<size_t>(tokens) * width);
      const auto rank = select({1, tokens, width, keep, type}, hidden);
      recycle({1, tokens, width, keep, pool, clusters, type == DType::kFloat32, type}, hidden, rank);
    }
  }
  std::puts("no races");
  return 0;
}
