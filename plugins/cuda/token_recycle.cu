// TokenRecycle in three launches: (1) products or differences of the pool's tokens; (2) distances and densities, a block
// for each token; (3) in every block again the peaks, the centres, and who joins whom, and then its own columns of the
// merged tokens. A large pool has its peaks in a launch of their own before the last. fp16 and bf16 distances come from
// products on tensor cores, d² = x·x + y·y - 2 x·y with all three products from the same tiles, so that equal tokens
// have a distance of exactly zero, as the tie rules require; fp32 adds up squared differences. The width is split over
// blocks by a rule that does not depend on the batch, and added up in a fixed order.
#include "cuda/block.cuh"
#include "cuda/kernels.h"
#include "cuda/tensor.cuh"

namespace vtexport::cuda {
namespace {

constexpr int kTile = 32;      // tokens per side
constexpr int kThreads = 128;  // for the distances: four warps with 16 x 16 products each
constexpr int kUnit = 64;      // elements of the width, by which it is split
template <typename T>
constexpr int kDepth = sizeof(T) == 2 ? 128 : 64;  // elements of the width in shared memory at a time
// Sixteen bytes more put neighbouring rows into different banks.
template <typename T>
constexpr int kStride = kDepth<T> + 16 / static_cast<int>(sizeof(T));

constexpr int kWide = 512;    // threads of the last launch
constexpr int kFewTokens = 256;  // the largest pool whose peaks every block of the last launch finds for itself
constexpr int kTeam = 16;     // threads that add up one token, two columns each
constexpr int kTeams = kWide / kTeam;
constexpr int kColumns = 2 * kTeam;

// How the distances are divided: `pairs` tiles on and below the diagonal, `splits` runs of `run` units of the width.
struct Cut {
  int pairs, splits, run;

  explicit Cut(const RecycleProblem& p) {
    const int tiles = ceil_div(p.pool, kTile), units = ceil_div(p.width, kUnit);
    pairs = tiles * (tiles + 1) / 2;
    const int wanted = ceil_div(256, pairs);  // about two blocks for each of an H200's 132 multiprocessors
    run = ceil_div(units, wanted < units ? wanted : units);
    run += run % 2;  // a whole number of depths for either type
    splits = ceil_div(units, run);
  }
};

// Which sums a problem needs: of squared differences, which only fp32 has, and of products.
__host__ __device__ inline bool has_differences(const RecycleProblem& p) { return p.type == DType::kFloat32; }
__host__ __device__ inline bool has_products(const RecycleProblem& p) { return p.paper || !has_differences(p); }

// The arrays in the workspace, each for `batch` rows.
struct Workspace {
  float *difference, *product, *length;  // [splits, m, m] twice, [splits, m]: x·x; what is not needed is null
  float *squared, *cosine;               // [m, m]; cosines for the paper's way only
  float *density, *farthest, *peak;      // [m] each
  int32_t* pool;                         // [m] places, -1 where place 0 stands in
  size_t bytes = 0;

  Workspace(const RecycleProblem& p, void* memory) {
    char* place = static_cast<char*>(memory);
    auto take = [&](bool needed, size_t elements) {
      char* own = place + bytes;
      if (needed) bytes += (static_cast<size_t>(p.batch) * elements * 4 + 255) / 256 * 256;
      return needed ? own : nullptr;
    };
    const size_t m = p.pool, splits = Cut(p).splits;
    difference = reinterpret_cast<float*>(take(has_differences(p), splits * m * m));
    product = reinterpret_cast<float*>(take(has_products(p), splits * m * m));
    length = reinterpret_cast<float*>(take(has_products(p), splits * m));
    squared = reinterpret_cast<float*>(take(true, m * m));
    cosine = reinterpret_cast<float*>(take(p.paper, m * m));
    density = reinterpret_cast<float*>(take(true, m));
    farthest = reinterpret_cast<float*>(take(true, m));
    peak = reinterpret_cast<float*>(take(true, m));
    pool = reinterpret_cast<int32_t*>(take(true, m));
  }
};

// Which tokens a block multiplies: tile y of the pool with tile x, whose places in the row of the batch are listed; -1
// beyond the pool's end.
struct Pair {
  int32_t place[2][kTile];

  // All threads must call it. Block 0 of each row of the batch also writes the pool, and that no token joined yet.
  __device__ void find(const RecycleProblem& p, const int32_t* rank, int y, int x, bool writes, int32_t* pool,
                       int32_t* cluster) {
    const int thread = static_cast<int>(threadIdx.x);
    if (thread < 2 * kTile) {
      const int in_pool = (thread < kTile ? y : x) * kTile + thread % kTile;
      place[thread / kTile][thread % kTile] = in_pool < p.pool ? 0 : -1;
    }
    const int32_t found = list_places<kThreads>(
        p.tokens, [&](int32_t i) { return rank[i] >= p.keep && rank[i] < p.keep + p.pool; },
        [&](int32_t number, int32_t i) {
          if (number >= p.pool) return;
          if (number / kTile == y) place[0][number % kTile] = i;
          if (number / kTile == x) place[1][number % kTile] = i;
          if (writes) pool[number] = i;
        });
    if (!writes) return;
#pragma unroll 1
    for (int i = found + thread; i < p.pool; i += kThreads) pool[i] = -1;
#pragma unroll 1
    for (int i = thread; i < p.tokens; i += kThreads) cluster[i] = -1;
  }
};

// Copies kDepth elements from `first` on of the rows at `place` into a tile.
template <typename T>
__device__ __forceinline__ void copy_tile(T (*tile)[kStride<T>], const int32_t* place, const T* hidden, int first,
                                          int width, bool vectors) {
  if (vectors) {
    constexpr int kVector = 16 / static_cast<int>(sizeof(T)), kPieces = kDepth<T> / kVector;
    static_assert(kTile * kPieces % kThreads == 0);
#pragma unroll
    for (int n = 0; n < kTile * kPieces / kThreads; ++n) {
      const int i = n * kThreads + static_cast<int>(threadIdx.x), row = i / kPieces, c = i % kPieces * kVector;
      const bool wanted = place[row] >= 0 && first + c < width;
      copy16(&tile[row][c], wanted ? hidden + static_cast<int64_t>(place[row]) * width + first + c : hidden, wanted);
    }
    return;
  }
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < kTile * kDepth<T>; i += kThreads) {
    const int row = i / kDepth<T>, c = i % kDepth<T>;
    const bool wanted = place[row] >= 0 && first + c < width;
    tile[row][c] = wanted ? hidden[static_cast<int64_t>(place[row]) * width + first + c] : zero_of<T>();
  }
}

// The sums of one block, as its threads hold them.
template <typename T, bool kOnTensorCores>
struct Sums;

// A warp has 16 x 16 of the products.
template <typename T>
struct Sums<T, true> {
  Sum16x8 product[2] = {};

  __device__ int row() const { return warp_number() / 2 * 16; }
  __device__ int column() const { return warp_number() % 2 * 16; }

  __device__ __forceinline__ void add(const T (*left)[kStride<T>], const T (*right)[kStride<T>], bool) {
#pragma unroll
    for (int d = 0; d < kDepth<T>; d += 16) {
      const Tile16 a = load_tile(&left[row()][d], kStride<T>), b = load_tile(&right[column()][d], kStride<T>);
      multiply<T>(product[0], a, b, 0);
      multiply<T>(product[1], a, b, 1);
    }
  }

  __device__ void write(float (*result)[kTile + 1], bool) const {
    const int i = row() + lane_number() / 4, j = column() + 2 * (lane_number() % 4);
    for (int half = 0; half < 2; ++half) {
      for (int e = 0; e < 4; ++e) result[i + e / 2 * 8][j + 8 * half + e % 2] = product[half].x[e];
    }
  }
};

// A thread has two rows and four columns.
template <typename T>
struct Sums<T, false> {
  float difference[2][4] = {}, product[2][4] = {};

  __device__ int row() const { return static_cast<int>(threadIdx.x) / 8; }
  __device__ int column() const { return static_cast<int>(threadIdx.x) % 8; }

  // `products` too, where differences are what distances come from.
  __device__ __forceinline__ void add(const T (*left)[kStride<T>], const T (*right)[kStride<T>], bool products) {
    constexpr bool kDifferences = sizeof(T) == 4;
    constexpr int kVector = kDifferences ? 4 : 1;
#pragma unroll 4
    for (int d = 0; d < kDepth<T>; d += kVector) {
      float a[2][kVector], b[4][kVector];
      for (int i = 0; i < 2; ++i) load(&left[row() + 16 * i][d], a[i]);
      for (int j = 0; j < 4; ++j) load(&right[column() + 8 * j][d], b[j]);
      for (int i = 0; i < 2; ++i) {
        for (int j = 0; j < 4; ++j) {
          for (int e = 0; e < kVector; ++e) {
            const float apart = a[i][e] - b[j][e];
            if constexpr (kDifferences) difference[i][j] = fmaf(apart, apart, difference[i][j]);
            if (!kDifferences || products) product[i][j] = fmaf(a[i][e], b[j][e], product[i][j]);
          }
        }
      }
    }
  }

  __device__ static void load(const float* from, float (&to)[4]) {
    const float4 four = *reinterpret_cast<const float4*>(from);
    to[0] = four.x;
    to[1] = four.y;
    to[2] = four.z;
    to[3] = four.w;
  }
  __device__ static void load(const T* from, float (&to)[1]) { to[0] = to_float(*from); }

  __device__ void write(float (*result)[kTile + 1], bool differences) const {
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < 4; ++j) result[row() + 16 * i][column() + 8 * j] = differences ? difference[i][j] : product[i][j];
    }
  }
};

// Sums over one run of the width of tiles on and below the diagonal. Those above are written too, from the same numbers:
// two tokens that are each other's nearest neighbours tie in density, and a matrix that is not symmetric to the last bit
// would break the tie.
template <typename T>
__global__ void __launch_bounds__(kThreads) measure(RecycleProblem p, int run, const T* hidden, const int32_t* rank,
                                                    Workspace w, int32_t* cluster) {
  __shared__ __align__(128) T tiles[2][2][kTile][kStride<T>];  // one pair is multiplied while the other is copied
  __shared__ float result[kTile][kTile + 1];
  __shared__ Pair pair;
  constexpr bool kDifferences = sizeof(T) == 4;
  let_next_begin();
  // Pair number n is row y, column x of the triangle.
  int y = 0, x = static_cast<int>(blockIdx.x);
  while (x > y) x -= ++y;
  const int64_t b = blockIdx.z;
  const int split = static_cast<int>(blockIdx.y);
  pair.find(p, rank + b * p.tokens, y, x, blockIdx.x == 0 && split == 0, w.pool + b * p.pool, cluster + b * p.tokens);
  hidden += b * p.tokens * p.width;
  const int right = x == y ? 0 : 1;
  constexpr int kVector = 16 / static_cast<int>(sizeof(T));
  const bool vectors = p.width % kVector == 0 && reinterpret_cast<uintptr_t>(hidden) % 16 == 0;
  const int begin = split * run * kUnit, steps = ceil_div(min(run * kUnit, p.width - begin), kDepth<T>);
  auto copy = [&](int step) {
    const int first = begin + step * kDepth<T>;
    copy_tile<T>(tiles[step % 2][0], pair.place[0], hidden, first, p.width, vectors);
    if (right == 1) copy_tile<T>(tiles[step % 2][1], pair.place[1], hidden, first, p.width, vectors);
  };
  Sums<T, sizeof(T) == 2 && kTensorCores<T>> sums;
  copy(0);
  commit_copies();
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) copy(step + 1);
    commit_copies();
    wait_copies<1>();
    __syncthreads();
    sums.add(tiles[step % 2][0], tiles[step % 2][right], p.paper);
    __syncthreads();
  }
  const int64_t own = b * gridDim.y + split;
  auto write = [&](bool differences, float* to) {
    to += own * p.pool * p.pool;
    sums.write(result, differences);
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < kTile * kTile; i += kThreads) {
      const int upper = i / kTile, lower = i % kTile, row = y * kTile + upper, column = x * kTile + lower;
      // On the diagonal what is above it is what is below.
      const float value = x == y && lower > upper ? result[lower][upper] : result[upper][lower];
      if (row < p.pool && column < p.pool) to[static_cast<int64_t>(row) * p.pool + column] = value;
      const int mirrored = x * kTile + upper, other = y * kTile + lower;
      if (x != y && mirrored < p.pool && other < p.pool) {
        to[static_cast<int64_t>(mirrored) * p.pool + other] = result[lower][upper];
      }
    }
    const int token = y * kTile + static_cast<int>(threadIdx.x);
    if (!differences && x == y && threadIdx.x < kTile && token < p.pool) {
      w.length[own * p.pool + token] = result[threadIdx.x][threadIdx.x];
    }
    __syncthreads();
  };
  if constexpr (kDifferences) write(true, w.difference);
  if (!kDifferences || p.paper) write(false, w.product);
}

// The sum over all splits.
__device__ __forceinline__ float add_splits(const float* first, int splits, int64_t apart) {
  float sum = 0;
#pragma unroll 8
  for (int s = 0; s < splits; ++s) sum += first[s * apart];
  return sum;
}

// One block per token of the pool: its distances, minus the mean of the nearest, and the greatest.
__global__ void __launch_bounds__(kBlock) densities(RecycleProblem p, int splits, Workspace w) {
  let_next_begin();
  wait_for_previous();
  float* row = reinterpret_cast<float*>(dynamic_shared());
  const int i = static_cast<int>(blockIdx.x), m = p.pool;
  const int64_t b = blockIdx.y, own = b * m + i, all = static_cast<int64_t>(m) * m, first = b * splits * all + i * m;
  const float* length = w.length + b * splits * m;
  const float mine = has_products(p) ? add_splits(length + i, splits, m) : 0.0f;
  float greatest = 0;
  for (int j = static_cast<int>(threadIdx.x); j < m; j += kBlock) {
    const float product = has_products(p) ? add_splits(w.product + first + j, splits, all) : 0.0f;
    const float other = has_products(p) ? add_splits(length + j, splits, m) : 0.0f;
    float distance = has_differences(p) ? add_splits(w.difference + first + j, splits, all) : mine + other - 2 * product;
    distance = (distance < 0 ? 0.0f : distance) / static_cast<float>(p.width);
    // NaN counts as far from everything, because sorting needs an order.
    distance = i == j ? 0.0f : isnan(distance) ? kInfinity : distance;
    row[j] = distance;
    w.squared[own * m + j] = distance;
    if (p.paper) {
      const float lengths = fmaxf(sqrtf(mine), 1e-12f) * fmaxf(sqrtf(other), 1e-12f);
      w.cosine[own * m + j] = ranked(product / lengths);
    }
    greatest = fmaxf(greatest, distance);
  }
  // The nearest are those below the farthest of them, and as many as it takes at its own distance.
  const Boundary boundary = find_rank<kBlock>(m, p.clusters - 1, [=](int32_t j) { return key_of(-row[j]); });
  const float edge = -value_of(boundary.key);
  float sum = 0;
  for (int j = static_cast<int>(threadIdx.x); j < m; j += kBlock) sum += row[j] < edge ? row[j] : 0.0f;
  sum = block_sum(sum) + static_cast<float>(p.clusters - boundary.greater) * edge;
  greatest = block_max(greatest);
  if (threadIdx.x == 0) {
    w.density[own] = -sum / static_cast<float>(p.clusters);
    w.farthest[own] = greatest;
  }
}

// The logarithm of delta * density of a token; `nearest` is its least distance to a denser one, infinite if there is none.
// Then it is the greatest distance of all, which no other exceeds.
__device__ inline float peak_of(float nearest, float greatest, float density) {
  return ranked(0.5f * logf(fminf(nearest, greatest)) + density);
}

__device__ inline bool denser(const float* density, int j, int i) {
  return density[j] > density[i] || (density[j] == density[i] && j < i);
}

// For pools of more than kFewTokens: one block per token.
__global__ void __launch_bounds__(kBlock) peaks(RecycleProblem p, Workspace w) {
  let_next_begin();
  wait_for_previous();
  const int i = static_cast<int>(blockIdx.x);
  const int64_t first = static_cast<int64_t>(blockIdx.y) * p.pool;
  const float* density = w.density + first;
  float greatest = 0, nearness = -kInfinity;
  for (int j = static_cast<int>(threadIdx.x); j < p.pool; j += kBlock) {
    greatest = fmaxf(greatest, w.farthest[first + j]);
    if (denser(density, j, i)) nearness = fmaxf(nearness, -w.squared[(first + i) * p.pool + j]);
  }
  greatest = block_max(greatest);
  nearness = block_max(nearness);
  if (threadIdx.x == 0) w.peak[first + i] = peak_of(-nearness, greatest, density[i]);
}

// The shared memory of the last launch: room for what threads exchange, and four arrays for the pool.
struct Last {
  static constexpr size_t kExchange = kTeams * 2 * kTeam * sizeof(float2);

  float* peak;                 // [m], until the centres are known, and then
  uint16_t *joined, *order;    // [m] clusters, and numbers in the pool by cluster
  uint16_t *centre, *offset;   // [c] numbers in the pool; [c + 1]: where in `order` each cluster begins

  __device__ explicit Last(const RecycleProblem& p) {
    peak = reinterpret_cast<float*>(dynamic_shared() + kExchange);
    joined = reinterpret_cast<uint16_t*>(peak);
    order = joined + p.pool;
    centre = order + p.pool;
    offset = centre + p.clusters;
  }
  static size_t size(const RecycleProblem& p) {
    return kExchange + 4 * static_cast<size_t>(p.pool) + 4 * static_cast<size_t>(p.clusters) + 2;
  }
};

// For every token i of the pool calls take(i, value), where `value` joins those of each(i, part, parts), the shares of
// several threads in the token's own loop. All threads of a block of kWide must call it.
template <typename Value, typename Each, typename Join, typename Take>
__device__ __forceinline__ void for_tokens(int m, Each each, Join join, Take take) {
  static_assert(kWide * sizeof(Value) <= Last::kExchange);
  Value* exchange = reinterpret_cast<Value*>(dynamic_shared());
  const int span = m < kWide ? ceil_div(m, kWarp) * kWarp : kWide, parts = kWide / span;
  const int thread = static_cast<int>(threadIdx.x), part = thread / span, own = thread % span;
#pragma unroll 1
  for (int base = 0; base < m; base += span) {
    const int i = base + own;
    if (part < parts && i < m) exchange[thread] = each(i, part, parts);
    __syncthreads();
    if (part == 0 && i < m) {
      Value value = exchange[own];
#pragma unroll 1
      for (int other = 1; other < parts; ++other) value = join(value, exchange[other * span + own]);
      take(i, value);
    }
    __syncthreads();
  }
}

// The peaks of a pool of at most kFewTokens.
__device__ __forceinline__ void find_peaks(const RecycleProblem& p, const Workspace& w, int64_t b, float* peak) {
  __shared__ float density[kFewTokens];
  const int m = p.pool, thread = static_cast<int>(threadIdx.x);
  float greatest = 0;
  if (thread < m) {
    density[thread] = w.density[b * m + thread];
    greatest = w.farthest[b * m + thread];
  }
  greatest = block_max<kWide>(greatest);
  // The matrix is symmetric, so that neighbouring threads read neighbours.
  const float* squared = w.squared + b * m * m;
  for_tokens<float>(
      m,
      [=](int i, int part, int parts) {
        float nearest = kInfinity;
#pragma unroll 16
        for (int j = part; j < m; j += parts) {
          const float distance = squared[j * m + i];
          if (denser(density, j, i)) nearest = fminf(nearest, distance);
        }
        return nearest;
      },
      [](float a, float c) { return fminf(a, c); },
      [=](int i, float nearest) { peak[i] = peak_of(nearest, greatest, density[i]); });
}

// How near a token is to a centre.
struct Near {
  float nearness;
  int32_t number;
};

// The first of equally near ones.
__device__ inline Near nearer(Near a, Near c) {
  return c.nearness > a.nearness || (c.nearness == a.nearness && c.number < a.number) ? c : a;
}

template <typename T>
__device__ __forceinline__ float2 load_pair(const T* from, bool vectors, bool second) {
  if constexpr (sizeof(T) == 4) {
    if (vectors) return *reinterpret_cast<const float2*>(from);
  } else {
    if (vectors) {
      const uint32_t both = *reinterpret_cast<const uint32_t*>(from);
      T values[2];
      memcpy(static_cast<void*>(values), &both, sizeof both);
      return make_float2(to_float(values[0]), to_float(values[1]));
    }
  }
  return make_float2(to_float(from[0]), second ? to_float(from[1]) : 0.0f);
}

// Adds up the tokens of each cluster in 32 columns at a time. Each team of threads has a run of the tokens ordered by
// cluster. It writes what lies in its run as a whole, and leaves its sums of the clusters at both ends in shared memory.
template <typename T>
__device__ __forceinline__ void add_clusters(const RecycleProblem& p, const Last& last, const int32_t* pool,
                                             const T* hidden, T* merged) {
  constexpr int kAhead = 8;  // tokens that are read before they are added
  auto* ends = reinterpret_cast<float2(*)[2][kTeam]>(dynamic_shared());
  const int m = p.pool, team = static_cast<int>(threadIdx.x) / kTeam, thread = static_cast<int>(threadIdx.x) % kTeam;
  const int run = ceil_div(m, kTeams), begin = min(team * run, m), end = min(begin + run, m);
  const bool vectors = p.width % 2 == 0 && reinterpret_cast<uintptr_t>(hidden) % (2 * sizeof(T)) == 0;
  for (int first = static_cast<int>(blockIdx.x) * kColumns; first < p.width; first += static_cast<int>(gridDim.x) * kColumns) {
    const int column = first + 2 * thread;
    const bool inside = column < p.width, second = column + 1 < p.width;
    auto finish = [&](int k, float2 sum) {
      if (!inside) return;
      const float members = p.paper ? 1.0f : static_cast<float>(last.offset[k + 1] - last.offset[k]);
      T* to = merged + static_cast<int64_t>(k) * p.width + column;
      store(sum.x / members, to[0]);
      if (second) store(sum.y / members, to[1]);
    };
    // The cluster's sum over this run, from the cluster's first or the run's first token on.
    auto leave = [&](int k, float2 sum) {
      const bool begun_before = last.offset[k] < begin, goes_on = last.offset[k + 1] > end;
      if (!begun_before && !goes_on) {
        finish(k, sum);
      } else {
        ends[team][begun_before ? 0 : 1][thread] = sum;
      }
    };
    float2 sum = make_float2(0, 0);
    int cluster = begin < end ? last.joined[last.order[begin]] : 0;
    for (int base = begin; base < end; base += kAhead) {
      float2 value[kAhead];
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        value[a] = make_float2(0, 0);
        if (base + a >= end || !inside) continue;
        const int64_t place = max(pool[last.order[base + a]], 0);
        value[a] = load_pair(hidden + place * p.width + column, vectors, second);
      }
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        if (base + a >= end) continue;
        const int own = last.joined[last.order[base + a]];
        if (own != cluster) {
          leave(cluster, sum);
          sum = make_float2(0, 0);
          cluster = own;
        }
        sum.x += value[a].x;
        sum.y += value[a].y;
      }
    }
    if (begin < end) leave(cluster, sum);
    __syncthreads();
    for (int k = team; k < p.clusters; k += kTeams) {
      const int from = last.offset[k] / run, to = (last.offset[k + 1] - 1) / run;
      if (from == to) continue;
      sum = ends[from][1][thread];
#pragma unroll 1
      for (int other = from + 1; other <= to; ++other) {
        sum.x += ends[other][0][thread].x;
        sum.y += ends[other][0][thread].y;
      }
      finish(k, sum);
    }
    __syncthreads();
  }
}

template <typename T>
__global__ void __launch_bounds__(kWide) merge(RecycleProblem p, Workspace w, const T* hidden, T* merged,
                                               int32_t* centres, int32_t* cluster) {
  wait_for_previous();
  const Last last(p);
  const int m = p.pool, thread = static_cast<int>(threadIdx.x);
  const int64_t b = blockIdx.y, all = static_cast<int64_t>(m) * m;
  const int32_t* pool = w.pool + b * m;
  uint32_t least = 0;  // key of a centre's peak
  if (m <= kFewTokens) {
    find_peaks(p, w, b, last.peak);
  } else {
#pragma unroll 1
    for (int i = thread; i < m; i += kWide) last.peak[i] = w.peak[b * m + i];
    __syncthreads();
    least = find_rank<kWide>(m, p.clusters - 1, [=](int32_t i) { return key_of(last.peak[i]); }).key;
  }
  for_tokens<int32_t>(
      m,
      [=](int i, int part, int parts) {
        const float own = last.peak[i];
        int32_t better = 0;
        if (key_of(own) < least) return p.clusters;
#pragma unroll 8
        for (int j = part; j < m; j += parts) better += last.peak[j] > own || (last.peak[j] == own && j < i);
        return better;
      },
      [](int32_t a, int32_t c) { return a + c; },
      [=](int i, int32_t number) {
        if (number < p.clusters) last.centre[number] = static_cast<uint16_t>(i);
      });
  const float* nearness = (p.paper ? w.cosine : w.squared) + b * all;  // both are symmetric
  for_tokens<Near>(
      m,
      [=](int i, int part, int parts) {
        Near best{-kInfinity, p.clusters};
#pragma unroll 4
        for (int k = part; k < p.clusters; k += parts) {
          const int centre = last.centre[k];
          const float near = nearness[static_cast<int64_t>(centre) * m + i];
          best = nearer(best, Near{centre == i ? kInfinity : p.paper ? near : -near, k});  // a centre joins itself
        }
        return best;
      },
      [](Near a, Near c) { return nearer(a, c); },
      [=](int i, Near best) { last.joined[i] = static_cast<uint16_t>(best.number); });
  // A warp per cluster: where it begins, and its tokens in their order.
  for (int k = warp_number(); k < p.clusters; k += kWide / kWarp) {
    int before = 0;
    for (int base = 0; base < m; base += kWarp) {
      const int i = base + lane_number();
      before += __popc(__ballot_sync(kAllLanes, i < m && last.joined[i] < k));
    }
    if (lane_number() == 0) last.offset[k] = static_cast<uint16_t>(before);
#pragma unroll 1
    for (int base = 0; base < m; base += kWarp) {
      const int i = base + lane_number();
      const bool mine = i < m && last.joined[i] == k;
      const unsigned ballot = __ballot_sync(kAllLanes, mine);
      if (mine) last.order[before + __popc(ballot & ((1u << lane_number()) - 1u))] = static_cast<uint16_t>(i);
      before += __popc(ballot);
    }
  }
  if (thread == 0) last.offset[p.clusters] = static_cast<uint16_t>(m);
  if (blockIdx.x == 0) {
#pragma unroll 1
    for (int k = thread; k < p.clusters; k += kWide) centres[b * p.clusters + k] = max(pool[last.centre[k]], 0);
#pragma unroll 1
    for (int i = thread; i < m; i += kWide) {
      if (pool[i] >= 0) cluster[b * p.tokens + pool[i]] = last.joined[i];
    }
  }
  __syncthreads();
  add_clusters(p, last, pool, hidden + b * p.tokens * p.width, merged + b * p.clusters * p.width);
}

template <typename T>
void run(Launcher& on, const RecycleProblem& p, const void* hidden, const int32_t* rank, void* merged, int32_t* centres,
         int32_t* cluster, void* memory) {
  const Workspace w(p, memory);
  const Cut cut(p);
  const T* rows = static_cast<const T*>(hidden);
  const unsigned m = static_cast<unsigned>(p.pool), batch = static_cast<unsigned>(p.batch);
  on.run(measure<T>, dim3(cut.pairs, cut.splits, batch), kThreads, 0, p, cut.run, rows, rank, w, cluster);
  const Launch of_tokens{dim3(m, batch), kBlock, m * sizeof(float), 1, true};
  on.run(densities, of_tokens, p, cut.splits, w);
  if (p.pool > kFewTokens) on.run(peaks, Launch{dim3(m, batch), kBlock, 0, 1, true}, p, w);
  // About two blocks for each of an H200's 132 multiprocessors; a block may take several times kColumns.
  const int most = ceil_div(p.width, kColumns), wanted = ceil_div(264, p.batch);
  const Launch of_columns{dim3(static_cast<unsigned>(most < wanted ? most : wanted), batch), kWide, Last::size(p), 1, true};
  on.run(merge<T>, of_columns, p, w, rows, static_cast<T*>(merged), centres, cluster);
}

}  // namespace

size_t workspace_size(const RecycleProblem& p) { return Workspace(p, nullptr).bytes; }

cudaError_t token_recycle(const RecycleProblem& p, const void* hidden, const int32_t* rank, void* merged,
                          int32_t* centres, int32_t* cluster, void* workspace, cudaStream_t stream) {
  if (p.refusal() != nullptr) return cudaErrorInvalidValue;
  if (p.batch == 0) return cudaSuccess;
  Launcher on(stream);
  for_type<__half, __nv_bfloat16>(p.type, [&](auto zero) {
    run<decltype(zero)>(on, p, hidden, rank, merged, centres, cluster, workspace);
  });
  return on.error();
}

}  // namespace vtexport::cuda
