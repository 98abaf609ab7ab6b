#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/number.h"
#include "cpu/ranking.h"

namespace vtexport::cpu {
namespace {

// The places of the ranks that the pool takes, ascending; no more of them than it holds, whatever the ranks are.
std::vector<int32_t> pool_of(const RecycleProblem& p, const int32_t* rank) {
  std::vector<int32_t> pool;
  for (int32_t v = 0; v < p.tokens; ++v) {
    const bool wanted = rank[v] >= p.keep && rank[v] < p.keep + p.pool;
    if (wanted && static_cast<int32_t>(pool.size()) < p.pool) pool.push_back(v);
  }
  return pool;
}

// Squared Euclidean distances over the width, [m, m], of the pool's rows.
template <typename T>
std::vector<float> distances(const T* hidden, const std::vector<int32_t>& pool, int32_t width) {
  const size_t m = pool.size();
  std::vector<float> squared(m * m, 0.0f);
  for (size_t i = 0; i < m; ++i) {
    for (size_t j = 0; j < i; ++j) {
      const T *a = hidden + static_cast<size_t>(pool[i]) * width, *b = hidden + static_cast<size_t>(pool[j]) * width;
      double sum = 0;
      for (int32_t c = 0; c < width; ++c) {
        const double difference = static_cast<double>(to_float(a[c])) - to_float(b[c]);
        sum += difference * difference;
      }
      // NaN counts as far from everything, because sorting needs an order.
      const float distance = static_cast<float>(sum / width);
      squared[i * m + j] = squared[j * m + i] = std::isnan(distance) ? std::numeric_limits<float>::infinity() : distance;
    }
  }
  return squared;
}

// Minus the mean of the `clusters` smallest distances of each row: the logarithm of its density.
std::vector<float> densities(const std::vector<float>& squared, size_t m, int32_t clusters) {
  std::vector<float> density(m), row(m);
  for (size_t i = 0; i < m; ++i) {
    std::copy_n(squared.begin() + i * m, m, row.begin());
    std::partial_sort(row.begin(), row.begin() + clusters, row.end());
    double sum = 0;
    for (int32_t k = 0; k < clusters; ++k) sum += row[k];
    density[i] = static_cast<float>(-sum / clusters);
  }
  return density;
}

// Numbers in the pool, by falling delta * density.
std::vector<int32_t> centres_of(const std::vector<float>& squared, const std::vector<float>& density, int32_t clusters) {
  const size_t m = density.size();
  const float farthest = *std::max_element(squared.begin(), squared.end());
  std::vector<float> peak(m);
  for (size_t i = 0; i < m; ++i) {
    float delta = farthest;
    for (size_t j = 0; j < m; ++j) {
      const bool denser = density[j] > density[i] || (density[j] == density[i] && j < i);
      if (denser) delta = std::min(delta, squared[i * m + j]);
    }
    peak[i] = 0.5f * std::log(delta) + density[i];
  }
  auto chosen = order_of(peak.data(), static_cast<int32_t>(m));
  chosen.resize(clusters);
  return chosen;
}

template <typename T>
double cosine(const T* a, const T* b, int32_t width) {
  double product = 0, first = 0, second = 0;
  for (int32_t c = 0; c < width; ++c) {
    const double x = to_float(a[c]), y = to_float(b[c]);
    product += x * y, first += x * x, second += y * y;
  }
  return product / (std::max(std::sqrt(first), 1e-12) * std::max(std::sqrt(second), 1e-12));
}

template <typename T>
void recycle_batch(const RecycleProblem& p, const T* hidden, const int32_t* rank, T* merged, int32_t* centres,
                   int32_t* cluster) {
  auto pool = pool_of(p, rank);
  const size_t m = static_cast<size_t>(p.pool), found = pool.size();
  pool.resize(m, 0);
  const auto squared = distances(hidden, pool, p.width);
  const auto chosen = centres_of(squared, densities(squared, m, p.clusters), p.clusters);
  std::fill(cluster, cluster + p.tokens, -1);
  std::vector<int32_t> joined(m);
  for (size_t i = 0; i < m; ++i) {
    float nearest = 0;
    for (int32_t k = 0; k < p.clusters; ++k) {
      const size_t centre = static_cast<size_t>(chosen[k]);
      float near = -squared[i * m + centre];
      if (p.paper) {
        near = static_cast<float>(cosine(hidden + static_cast<size_t>(pool[i]) * p.width,
                                         hidden + static_cast<size_t>(pool[centre]) * p.width, p.width));
      }
      if (centre == i) {
        joined[i] = k;
        break;
      }
      if (std::isnan(near)) near = -std::numeric_limits<float>::infinity();
      if (k == 0 || near > nearest) {
        nearest = near;
        joined[i] = k;
      }
    }
    if (i < found) cluster[pool[i]] = joined[i];
  }
  std::vector<double> sum(p.width);
  for (int32_t k = 0; k < p.clusters; ++k) {
    centres[k] = pool[static_cast<size_t>(chosen[k])];
    std::fill(sum.begin(), sum.end(), 0.0);
    int32_t members = 0;
    for (size_t i = 0; i < m; ++i) {
      if (joined[i] != k) continue;
      ++members;
      const T* row = hidden + static_cast<size_t>(pool[i]) * p.width;
      for (int32_t c = 0; c < p.width; ++c) sum[c] += to_float(row[c]);
    }
    for (int32_t c = 0; c < p.width; ++c) {
      store(static_cast<float>(p.paper ? sum[c] : sum[c] / members), merged[static_cast<size_t>(k) * p.width + c]);
    }
  }
}

template <typename T>
void recycle_all(const RecycleProblem& p, const void* hidden, const int32_t* rank, void* merged, int32_t* centres,
                 int32_t* cluster) {
  for (int32_t b = 0; b < p.batch; ++b) {
    const size_t row = static_cast<size_t>(b);
    recycle_batch(p, static_cast<const T*>(hidden) + row * p.tokens * p.width, rank + row * p.tokens,
                  static_cast<T*>(merged) + row * p.clusters * p.width, centres + row * p.clusters,
                  cluster + row * p.tokens);
  }
}

}  // namespace

void token_recycle(const RecycleProblem& problem, const void* hidden, const int32_t* rank, void* merged,
                   int32_t* centres, int32_t* cluster) {
  for_type<Float16, BFloat16>(problem.type, [&](auto zero) {
    recycle_all<decltype(zero)>(problem, hidden, rank, merged, centres, cluster);
  });
}

}  // namespace vtexport::cpu
