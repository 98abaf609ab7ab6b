// TokenSelect: one block ranks a row's scores by counting, lists the kept places in order, and blocks of threads then
// copy their rows, sixteen bytes at a time where alignment allows.
#include "cuda/block.cuh"
#include "cuda/kernels.h"

namespace vtexport::cuda {
namespace {

__global__ void __launch_bounds__(kBlock) choose(SelectProblem p, const float* score, int32_t* index) {
  extern __shared__ float values[];
  __shared__ int32_t counts[kBlock + 1];
  const int b = blockIdx.x;
  for (int i = threadIdx.x; i < p.tokens; i += kBlock) values[i] = ranked(score[static_cast<int64_t>(b) * p.tokens + i]);
  __syncthreads();
  int32_t* own = index + static_cast<int64_t>(b) * p.keep;
  list_places(
      p.tokens, counts, [&](int32_t i) { return rank_of(values, p.tokens, i) < p.keep; },
      [&](int32_t number, int32_t i) { own[number] = i; });
}

template <typename Word>
__global__ void copy_rows(SelectProblem p, int words, const Word* hidden, const int32_t* index, Word* kept) {
  const int64_t to = static_cast<int64_t>(blockIdx.y) * p.keep + blockIdx.x;
  const int64_t from = static_cast<int64_t>(blockIdx.y) * p.tokens + index[to];
  for (int w = threadIdx.x; w < words; w += blockDim.x) kept[to * words + w] = hidden[from * words + w];
}

template <typename Word>
void copy(const SelectProblem& p, const void* hidden, const int32_t* index, void* kept, cudaStream_t stream) {
  const int words = static_cast<int>(p.width * size_of(p.type) / sizeof(Word));
  const dim3 grid(p.keep, p.batch);
  copy_rows<<<grid, kBlock, 0, stream>>>(p, words, static_cast<const Word*>(hidden), index, static_cast<Word*>(kept));
}

}  // namespace

size_t workspace_size(const SelectProblem&) { return 0; }

cudaError_t token_select(const SelectProblem& p, const void* hidden, const float* score, void* kept, int32_t* index,
                         void*, cudaStream_t stream) {
  if (p.refusal() != nullptr) return cudaErrorInvalidValue;
  if (p.batch == 0) return cudaSuccess;
  choose<<<p.batch, kBlock, p.tokens * sizeof(float), stream>>>(p, score, index);
  const uintptr_t place = reinterpret_cast<uintptr_t>(hidden) | reinterpret_cast<uintptr_t>(kept);
  const size_t row = p.width * size_of(p.type);
  if (row % 16 == 0 && place % 16 == 0) {
    copy<uint4>(p, hidden, index, kept, stream);
  } else if (row % 4 == 0 && place % 4 == 0) {
    copy<uint32_t>(p, hidden, index, kept, stream);
  } else {
    copy<uint16_t>(p, hidden, index, kept, stream);
  }
  return cudaGetLastError();
}

}  // namespace vtexport::cuda
