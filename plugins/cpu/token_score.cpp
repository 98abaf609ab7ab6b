#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/number.h"
#include "cpu/ranking.h"

namespace vtexport::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Softmaxed attention of one row to keys 0 … last, into weights[last + 1].
template <typename T>
void attend(const T* query, const T* key, int32_t last, int32_t size, float scale, float* weights) {
  float greatest = -kInfinity;
  bool broken = false;
  for (int32_t n = 0; n <= last; ++n) {
    float sum = 0;
    for (int32_t d = 0; d < size; ++d) sum += (to_float(query[d]) * scale) * to_float(key[static_cast<size_t>(n) * size + d]);
    weights[n] = sum;
    broken |= std::isnan(sum);
    greatest = std::max(greatest, sum);
  }
  // As in every softmax, one NaN or an infinite greatest logit makes the whole row NaN.
  if (broken || std::isinf(greatest)) {
    std::fill(weights, weights + last + 1, std::numeric_limits<float>::quiet_NaN());
    return;
  }
  double total = 0;
  for (int32_t n = 0; n <= last; ++n) total += weights[n] = std::exp(weights[n] - greatest);
  for (int32_t n = 0; n <= last; ++n) weights[n] = static_cast<float>(weights[n] / total);
}

template <typename T>
void score_batch(const ScoreProblem& p, int32_t b, const T* query, const T* key, const int64_t* places, int64_t start,
                 const float* divisor, float* score) {
  // Wherever beyond the keys it lies, no column of it counts.
  start = std::clamp<int64_t>(start, -p.visual, p.keys);
  const int64_t number = std::count_if(places, places + p.rows, [](int64_t place) { return place >= 0; });
  const float share = number > 0 ? 1.0f / static_cast<float>(number) : 0.0f;
  std::vector<float> weights(p.keys), by_head(static_cast<size_t>(p.heads) * p.visual, 0.0f);
  for (int32_t h = 0; h < p.heads; ++h) {
    const int32_t group = h / (p.heads / p.kv_heads);
    const T* keys = key + (static_cast<int64_t>(b) * p.kv_heads + group) * p.keys * p.size;
    float* sums = by_head.data() + static_cast<size_t>(h) * p.visual;
    for (int32_t r = 0; r < p.rows; ++r) {
      if (places[r] < 0) continue;
      const T* row = query + ((static_cast<int64_t>(b) * p.heads + h) * p.rows + r) * p.size;
      const int32_t last = static_cast<int32_t>(std::min<int64_t>(places[r], p.keys - 1));
      attend(row, keys, last, p.size, p.scale, weights.data());
      for (int32_t v = 0; v < p.visual; ++v) {
        const int64_t column = start + v;
        float weight = column >= 0 && column <= last ? weights[column] : 0.0f;
        if (divisor != nullptr) weight /= divisor[static_cast<size_t>(r) * p.visual + v];
        sums[v] += weight * share;
      }
    }
  }
  std::vector<int32_t> chosen(p.heads);
  std::iota(chosen.begin(), chosen.end(), 0);
  if (p.best_heads > 0) {
    std::vector<float> totals(p.heads);
    for (int32_t h = 0; h < p.heads; ++h) {
      const float* sums = by_head.data() + static_cast<size_t>(h) * p.visual;
      totals[h] = std::accumulate(sums, sums + p.visual, 0.0f);
    }
    chosen = best(totals.data(), p.heads, p.best_heads);
  }
  for (int32_t v = 0; v < p.visual; ++v) {
    float sum = 0;
    for (int32_t h : chosen) sum += by_head[static_cast<size_t>(h) * p.visual + v];
    score[v] = sum / static_cast<float>(chosen.size());
  }
}

template <typename T>
void score_all(const ScoreProblem& p, const void* query, const void* key, const int64_t* places, const int64_t* start,
               const float* divisor, float* score) {
  for (int32_t b = 0; b < p.batch; ++b) {
    const size_t rows = static_cast<size_t>(b) * p.rows;
    score_batch(p, b, static_cast<const T*>(query), static_cast<const T*>(key), places + rows, start[b],
                divisor == nullptr ? nullptr : divisor + rows * p.visual, score + static_cast<size_t>(b) * p.visual);
  }
}

}  // namespace

void token_score(const ScoreProblem& problem, const void* query, const void* key, const int64_t* places,
                 const int64_t* start, const float* divisor, float* score) {
  for_type<Float16, BFloat16>(problem.type, [&](auto zero) {
    score_all<decltype(zero)>(problem, query, key, places, start, divisor, score);
  });
}

}  // namespace vtexport::cpu
