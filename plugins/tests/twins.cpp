// Random problems through every twin, on heap arrays of exactly the size that the contract says: built with sanitizers,
// any access outside them, any overflow and any misaligned read ends the program (tests/plugins/test_sanitizers.py).
//   twins        on one thread
//   twins N      on N threads at once
#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/number.h"

namespace {

using vtexport::DType;

thread_local std::mt19937 generator(1);

int32_t between(int32_t low, int32_t high) { return std::uniform_int_distribution<int32_t>(low, high)(generator); }

void expect(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

// `count` random elements of `type`, now and then a NaN or an infinity.
std::vector<char> elements(DType type, size_t count) {
  std::vector<char> bytes(count * vtexport::size_of(type));
  std::normal_distribution<float> normal;
  for (size_t i = 0; i < count; ++i) {
    float value = between(0, 99) == 0 ? (between(0, 1) ? NAN : -INFINITY) : normal(generator);
    char* place = bytes.data() + i * vtexport::size_of(type);
    if (type == DType::kFloat32) vtexport::cpu::store(value, *reinterpret_cast<float*>(place));
    if (type == DType::kFloat16) vtexport::cpu::store(value, *reinterpret_cast<vtexport::cpu::Float16*>(place));
    if (type == DType::kBFloat16) vtexport::cpu::store(value, *reinterpret_cast<vtexport::cpu::BFloat16*>(place));
  }
  return bytes;
}

std::vector<float> scores(size_t count) {
  std::vector<float> values(count);
  for (float& value : values) value = between(0, 9) == 0 ? NAN : static_cast<float>(between(0, 5)) / 4;
  return values;
}

void score(DType type) {
  vtexport::ScoreProblem p{between(1, 3), 0, between(1, 3), between(1, 5), between(1, 20), between(1, 9), 0, 0.3f, 0, type};
  p.heads = p.kv_heads * between(1, 3);
  p.visual = between(1, p.keys);
  p.best_heads = between(0, p.heads);
  expect(p.refusal() == nullptr, "a sound score problem is refused");
  const size_t rows = static_cast<size_t>(p.batch) * p.rows;
  auto query = elements(type, rows * p.heads * p.size);
  auto key = elements(type, static_cast<size_t>(p.batch) * p.kv_heads * p.keys * p.size);
  std::vector<int64_t> places(rows), start(p.batch);
  std::vector<float> divisor(rows * p.visual, 2.0f), found(static_cast<size_t>(p.batch) * p.visual, -1.0f);
  for (size_t i = 0; i < rows; ++i) {
    places[i] = between(-p.keys, 2 * p.keys);
  }
  const bool far = between(0, 9) == 0;  // nowhere near the keys
  for (int64_t& first : start) first = far ? (between(0, 1) ? INT64_MAX : INT64_MIN) : between(0, p.keys - p.visual);
  vtexport::cpu::token_score(p, query.data(), key.data(), places.data(), start.data(), p.best_heads > 0 ? divisor.data() : nullptr,
                             found.data());
  for (float value : found) expect(std::isnan(value) || (value >= 0 && value <= 1.0001f), "a score is out of range");
}

void select(DType type) {
  vtexport::SelectProblem p{between(1, 3), between(1, 30), between(1, 9), 0, type};
  p.keep = between(1, p.tokens);
  expect(p.refusal() == nullptr, "a sound select problem is refused");
  auto hidden = elements(type, static_cast<size_t>(p.batch) * p.tokens * p.width);
  auto score = scores(static_cast<size_t>(p.batch) * p.tokens);
  std::vector<char> kept(static_cast<size_t>(p.batch) * p.keep * p.width * vtexport::size_of(type));
  std::vector<int32_t> index(static_cast<size_t>(p.batch) * p.keep), rank(static_cast<size_t>(p.batch) * p.tokens);
  vtexport::cpu::token_select(p, hidden.data(), score.data(), kept.data(), index.data(), rank.data());
  for (size_t i = 0; i < index.size(); ++i) {
    expect(index[i] >= 0 && index[i] < p.tokens, "an index is out of range");
    expect(i % p.keep == 0 || index[i] > index[i - 1], "indices do not ascend");
    expect(rank[i / p.keep * p.tokens + index[i]] < p.keep, "a kept token's rank is too high");
  }
  std::vector<bool> taken(rank.size());
  for (size_t i = 0; i < rank.size(); ++i) {
    expect(rank[i] >= 0 && rank[i] < p.tokens, "a rank is out of range");
    const size_t place = i / p.tokens * p.tokens + rank[i];
    expect(!taken[place], "two tokens have one rank");
    taken[place] = true;
  }
}

void recycle(DType type) {
  vtexport::RecycleProblem p{between(1, 3), between(2, 30), between(1, 9), 0, 0, 0, between(0, 1) == 1, type};
  p.keep = between(0, p.tokens - 1);
  p.pool = between(1, p.tokens - p.keep);
  p.clusters = between(1, p.pool);
  expect(p.refusal() == nullptr, "a sound recycle problem is refused");
  auto hidden = elements(type, static_cast<size_t>(p.batch) * p.tokens * p.width);
  std::vector<int32_t> rank(static_cast<size_t>(p.batch) * p.tokens);
  const bool sound = between(0, 3) > 0;  // else ranks are no permutation, and everything must stay in range all the same
  for (int32_t b = 0; b < p.batch; ++b) {
    int32_t* own = rank.data() + static_cast<size_t>(b) * p.tokens;
    std::iota(own, own + p.tokens, 0);
    std::shuffle(own, own + p.tokens, generator);
    for (int32_t v = 0; v < p.tokens && !sound; ++v) own[v] = between(0, 4) == 0 ? between(INT32_MIN, INT32_MAX) : own[v] / 2;
  }
  std::vector<char> merged(static_cast<size_t>(p.batch) * p.clusters * p.width * vtexport::size_of(type));
  std::vector<int32_t> centres(static_cast<size_t>(p.batch) * p.clusters), cluster(static_cast<size_t>(p.batch) * p.tokens);
  vtexport::cpu::token_recycle(p, hidden.data(), rank.data(), merged.data(), centres.data(), cluster.data());
  for (int32_t b = 0; b < p.batch; ++b) {
    int32_t pooled = 0;
    for (int32_t v = 0; v < p.tokens; ++v) {
      const int32_t joined = cluster[static_cast<size_t>(b) * p.tokens + v];
      expect(joined >= -1 && joined < p.clusters, "a cluster is out of range");
      pooled += joined >= 0;
    }
    expect(sound ? pooled == p.pool : pooled <= p.pool, "another number of tokens joined than the pool holds");
    for (int32_t k = 0; k < p.clusters; ++k) {
      const int32_t centre = centres[static_cast<size_t>(b) * p.clusters + k];
      expect(centre >= 0 && centre < p.tokens, "a centre is out of range");
      expect(!sound || cluster[static_cast<size_t>(b) * p.tokens + centre] == k, "a centre is not in its own cluster");
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  auto work = [] {
    for (int round = 0; round < 300; ++round) {
      for (DType type : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
        score(type);
        select(type);
        recycle(type);
      }
    }
  };
  std::vector<std::thread> threads;
  for (int t = 1; t < (count > 1 ? std::atoi(arguments[1]) : 1); ++t) threads.emplace_back(work);
  work();
  for (std::thread& thread : threads) thread.join();
  std::puts("all twins passed");
  return 0;
}
