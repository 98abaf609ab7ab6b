// TokenSelect in one launch. Every block finds the score of the last kept token by counting, lists the kept tokens and
// copies its share of their rows, sixteen bytes at a time where alignment allows. It also ranks its share of the tokens,
// by comparing each with all others, which is faster than sorting a few thousand.
#include "cuda/block.cuh"
#include "cuda/kernels.h"

namespace vtexport::cuda {
namespace {

constexpr int kMostRows = 32;   // that a block copies
constexpr int kMostRanks = 64;  // that a block finds, unless many tokens are kept

// How a problem is divided among blocks; nothing depends on it but the time.
struct Cut {
  int blocks, rows, ranks;  // per row of the batch; per block

  explicit Cut(const SelectProblem& p) {
    // About two blocks for each of an H200's 132 multiprocessors, but not more than there are rows or warps' work.
    const int wanted = ceil_div(264, p.batch), most = p.keep > ceil_div(p.tokens, 8) ? p.keep : ceil_div(p.tokens, 8);
    blocks = wanted < most ? wanted : most;
    for (int least : {ceil_div(p.keep, kMostRows), ceil_div(p.tokens, kMostRanks)}) blocks = blocks < least ? least : blocks;
    rows = ceil_div(p.keep, blocks);
    ranks = ceil_div(p.tokens, blocks);
  }
};

template <typename Word>
__global__ void __launch_bounds__(kBlock) select(SelectProblem p, Cut cut, int words, const float* score,
                                                 const Word* hidden, Word* kept, int32_t* index, int32_t* rank) {
  __shared__ int32_t last_equal, place[kMostRows];
  const int64_t b = blockIdx.y;
  score += b * p.tokens;
  auto key = [=](int32_t i) { return key_of(ranked(score[i])); };
  const Boundary boundary = find_rank<kBlock>(p.tokens, p.keep - 1, key);
  // Of the tokens whose score is that of the last kept one, the first are kept.
  const int32_t equals = p.keep - boundary.greater;
  if (threadIdx.x == 0) last_equal = p.tokens;
  __syncthreads();
  if (equals < boundary.equal) {
    list_places<kBlock>(
        p.tokens, [=](int32_t i) { return key(i) == boundary.key; },
        [=](int32_t number, int32_t i) {
          if (number == equals - 1) last_equal = i;
        });
  }
  const int32_t last = last_equal, first = static_cast<int32_t>(blockIdx.x) * cut.rows;
  list_places<kBlock>(
      p.tokens, [=](int32_t i) { return key(i) > boundary.key || (key(i) == boundary.key && i <= last); },
      [=](int32_t number, int32_t i) {
        if (number >= first && number < first + cut.rows) place[number - first] = i;
      });
  const int rows = min(cut.rows, p.keep - first);
  for (int r = 0; r < rows; ++r) {
    const int64_t to = (b * p.keep + first + r) * words, from = (b * p.tokens + place[r]) * words;
#pragma unroll 4
    for (int w = static_cast<int>(threadIdx.x); w < words; w += kBlock) kept[to + w] = hidden[from + w];
    if (threadIdx.x == 0) index[b * p.keep + first + r] = place[r];
  }
  for (int t = warp_number(); t < cut.ranks; t += kBlock / kWarp) {
    const int32_t token = static_cast<int32_t>(blockIdx.x) * cut.ranks + t;
    if (token >= p.tokens) break;
    const float own = ranked(score[token]);
    int32_t better = 0;
#pragma unroll 4
    for (int32_t j = lane_number(); j < p.tokens; j += kWarp) {
      const float other = ranked(score[j]);
      better += other > own || (other == own && j < token);
    }
    better = warp_sum(better);
    if (lane_number() == 0) rank[b * p.tokens + token] = better;
  }
}

template <typename Word>
void run(Launcher& on, const SelectProblem& p, const void* hidden, const float* score, void* kept, int32_t* index,
         int32_t* rank) {
  const Cut cut(p);
  const int words = static_cast<int>(p.width * size_of(p.type) / sizeof(Word));
  on.run(select<Word>, dim3(cut.blocks, p.batch), kBlock, 0, p, cut, words, score, static_cast<const Word*>(hidden),
         static_cast<Word*>(kept), index, rank);
}

}  // namespace

size_t workspace_size(const SelectProblem&) { return 0; }

cudaError_t token_select(const SelectProblem& p, const void* hidden, const float* score, void* kept, int32_t* index,
                         int32_t* rank, void*, cudaStream_t stream) {
  if (p.refusal() != nullptr) return cudaErrorInvalidValue;
  if (p.batch == 0) return cudaSuccess;
  Launcher on(stream);
  const uintptr_t place = reinterpret_cast<uintptr_t>(hidden) | reinterpret_cast<uintptr_t>(kept);
  const size_t row = p.width * size_of(p.type);
  if (row % 16 == 0 && place % 16 == 0) {
    run<uint4>(on, p, hidden, score, kept, index, rank);
  } else if (row % 4 == 0 && place % 4 == 0) {
    run<uint32_t>(on, p, hidden, score, kept, index, rank);
  } else {
    run<uint16_t>(on, p, hidden, score, kept, index, rank);
  }
  return on.error();
}

}  // namespace vtexport::cuda
