// Ranks by counting: every score is compared with every other. For a few thousand scores this is faster than sorting,
// and it spreads over as many blocks as the GPU can run.
#include "cuda/ranking.cuh"

#include "cuda/block.cuh"

namespace vtexport::cuda {
namespace {

constexpr int kEach = 4;  // scores a warp ranks at once
constexpr int kRanked = kBlock / kWarp * kEach;

__global__ void __launch_bounds__(kBlock) count_better(const float* score, int32_t tokens, int32_t* rank) {
  const int64_t row = static_cast<int64_t>(blockIdx.y) * tokens;
  const int32_t first = static_cast<int32_t>(blockIdx.x) * kRanked + warp_number() * kEach;
  score += row;
  float own[kEach];
  int32_t better[kEach];
  for (int e = 0; e < kEach; ++e) {
    own[e] = first + e < tokens ? ranked(score[first + e]) : 0.0f;
    better[e] = 0;
  }
  for (int32_t j = lane_number(); j < tokens; j += kWarp) {
    const float other = ranked(score[j]);
    for (int e = 0; e < kEach; ++e) better[e] += other > own[e] || (other == own[e] && j < first + e);
  }
  for (int e = 0; e < kEach; ++e) {
    const int32_t sum = warp_sum(better[e]);
    if (lane_number() == 0 && first + e < tokens) rank[row + first + e] = sum;
  }
}

}  // namespace

void rank_all(Launcher& on, const float* score, int32_t batch, int32_t tokens, int32_t* rank) {
  const unsigned blocks = static_cast<unsigned>((tokens + kRanked - 1) / kRanked);
  on.run(count_better, dim3(blocks, batch), kBlock, 0, score, tokens, rank);
}

}  // namespace vtexport::cuda
