// TokenSelect in two launches: ranks, and then one block per token, which counts the kept tokens before it and copies
// its row there, sixteen bytes at a time where alignment allows.
#include "cuda/block.cuh"
#include "cuda/kernels.h"
#include "cuda/ranking.cuh"

namespace vtexport::cuda {
namespace {

template <typename Word>
__global__ void __launch_bounds__(kBlock) gather(SelectProblem p, int words, const int32_t* rank, const Word* hidden,
                                                 Word* kept, int32_t* index) {
  const int32_t token = static_cast<int32_t>(blockIdx.x);
  const int64_t b = blockIdx.y;
  rank += b * p.tokens;
  if (rank[token] >= p.keep) return;
  int32_t number = 0;
  for (int32_t base = 0; base < token; base += kBlock) {
    const int32_t place = base + static_cast<int32_t>(threadIdx.x);
    number += __syncthreads_count(place < token && rank[place] < p.keep);
  }
  const int64_t to = b * p.keep + number, from = b * p.tokens + token;
  if (threadIdx.x == 0) index[to] = token;
  for (int w = static_cast<int>(threadIdx.x); w < words; w += kBlock) kept[to * words + w] = hidden[from * words + w];
}

template <typename Word>
void run(Launcher& on, const SelectProblem& p, const int32_t* rank, const void* hidden, void* kept, int32_t* index) {
  const int words = static_cast<int>(p.width * size_of(p.type) / sizeof(Word));
  on.run(gather<Word>, dim3(p.tokens, p.batch), kBlock, 0, p, words, rank, static_cast<const Word*>(hidden),
         static_cast<Word*>(kept), index);
}

}  // namespace

size_t workspace_size(const SelectProblem&) { return 0; }

cudaError_t token_select(const SelectProblem& p, const void* hidden, const float* score, void* kept, int32_t* index,
                         int32_t* rank, void*, cudaStream_t stream) {
  if (p.refusal() != nullptr) return cudaErrorInvalidValue;
  if (p.batch == 0) return cudaSuccess;
  Launcher on(stream);
  rank_all(on, score, p.batch, p.tokens, rank);
  const uintptr_t place = reinterpret_cast<uintptr_t>(hidden) | reinterpret_cast<uintptr_t>(kept);
  const size_t row = p.width * size_of(p.type);
  if (row % 16 == 0 && place % 16 == 0) {
    run<uint4>(on, p, rank, hidden, kept, index);
  } else if (row % 4 == 0 && place % 4 == 0) {
    run<uint32_t>(on, p, rank, hidden, kept, index);
  } else {
    run<uint16_t>(on, p, rank, hidden, kept, index);
  }
  return on.error();
}

}  // namespace vtexport::cuda
