// The contract of the op domain `vtexport`, shared by every implementation: the inputs of an op, and what it refuses.
// What each op computes is documented once, in exporter/vtexport/pruning/ops.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>

namespace vtexport {

enum class DType : int32_t { kFloat32, kFloat16, kBFloat16 };

constexpr size_t size_of(DType type) { return type == DType::kFloat32 ? 4 : 2; }

// Calls `run` with a zero of the C++ type that stands for `type`: float, Float16 or BFloat16.
template <typename Float16, typename BFloat16, typename Run>
auto for_type(DType type, Run run) {
  switch (type) {
    case DType::kFloat16:
      return run(Float16{});
    case DType::kBFloat16:
      return run(BFloat16{});
    default:
      return run(float{});
  }
}

// Limits far above any model, below which no size or index that an implementation computes can overflow: the largest
// problem of LLaVA has a batch of 64, 40 heads and 2,880 keys.
constexpr int64_t kMostExtent = int64_t{1} << 20;
constexpr int64_t kMostElements = int64_t{1} << 36;  // of one array

// Whether an array may have these extents.
inline bool within_limits(std::initializer_list<int64_t> extents) {
  int64_t elements = 1;
  for (const int64_t extent : extents) {
    if (extent < 0 || extent > kMostExtent) return false;
    elements *= extent;  // at most 2^36 * 2^20
    if (elements > kMostElements) return false;
  }
  return true;
}

// TokenScore, and TokenScoreHeads where best_heads > 0.
//   query [batch, heads, rows, size], key [batch, kv_heads, keys, size], places [batch, rows] int64, start [batch] int64,
//   divisor [batch, rows, visual] fp32 or null
//   -> score [batch, visual] fp32
// A row with a negative place does not count; any other place is the last key that the row sees, or beyond it.
struct ScoreProblem {
  int32_t batch, heads, kv_heads, rows, keys, size, visual;
  float scale;
  int32_t best_heads;  // 0: the mean of all heads; else attention is divided, and this many heads are averaged
  DType type;

  // Whether sizes can be computed from it; upper bounds of extents, which need not fit together, can be asked about too.
  bool within_limits() const {
    return vtexport::within_limits({batch, heads, rows, size}) && vtexport::within_limits({batch, kv_heads, keys, size}) &&
           vtexport::within_limits({batch, rows, visual}) && vtexport::within_limits({batch, rows, keys});
  }

  // Why no implementation can run this problem; null if every one can.
  const char* refusal() const {
    if (batch < 0 || rows < 1 || keys < 1 || size < 1 || visual < 1) return "an extent is too small";
    if (heads < 1 || kv_heads < 1 || heads % kv_heads != 0) return "heads is not a multiple of key heads";
    if (visual > keys) return "count exceeds the number of keys";
    if (best_heads < 0 || best_heads > heads) return "heads to average is out of range";
    if (!within_limits()) return "an array is too large";
    return nullptr;
  }
};

// TokenSelect: hidden [batch, tokens, width], score [batch, tokens] fp32 -> kept [batch, keep, width],
// index [batch, keep] int32 ascending, rank [batch, tokens] int32.
struct SelectProblem {
  int32_t batch, tokens, width, keep;
  DType type;

  bool within_limits() const {
    return vtexport::within_limits({batch, tokens, width}) && vtexport::within_limits({batch, keep, width});
  }

  const char* refusal() const {
    if (batch < 0 || tokens < 1 || width < 1) return "an extent is too small";
    if (keep < 1 || keep > tokens) return "keep is out of range";
    if (!within_limits()) return "an array is too large";
    return nullptr;
  }
};

// TokenRecycle: hidden [batch, tokens, width], rank [batch, tokens] int32 -> merged [batch, clusters, width],
// centres [batch, clusters] int32, cluster [batch, tokens] int32. Ranks are TokenSelect's; with others, which need not be
// a permutation, results mean nothing, but all of them are in range, and nothing outside the arrays is read or written:
// the pool is then the first `pool` places of the ranks it takes, filled up with place 0.
struct RecycleProblem {
  int32_t batch, tokens, width, keep, pool, clusters;
  bool paper;  // join by cosine and sum, instead of by distance and average
  DType type;

  bool within_limits() const {
    return width >= 1 && pool >= 1 && pool <= UINT16_MAX &&  // kernels divide by the former and number the latter
           vtexport::within_limits({batch, tokens, width}) && vtexport::within_limits({batch, pool, width}) &&
           vtexport::within_limits({batch, pool, clusters}) && vtexport::within_limits({keep});
  }

  const char* refusal() const {
    if (batch < 0 || tokens < 1 || width < 1) return "an extent is too small";
    if (keep < 0 || pool < 1 || pool > tokens - keep) return "pool is out of range";
    if (clusters < 1 || clusters > pool) return "clusters is out of range";
    if (!within_limits()) return "an array is too large";
    return nullptr;
  }
};

}  // namespace vtexport
