// TokenScore in two launches where a cluster of blocks holds all keys of a head, or one block does: (1) each block
// multiplies a group of rows by its keys, the cluster exchanges the rows' greatest logits and sums through shared
// memory, and each block adds up its visual columns; (2) the mean over heads and groups. So every key is read once for
// 64 rows. Elsewhere in three: (1) greatest logits and sums of some keys at a time; (2) the visual columns again,
// weighted by those and added up; (3) the mean. Attention itself is never written, and every sum has a fixed order, whatever
// the batch. fp16 and bf16 products run on tensor cores with fp32 accumulation; fp32 stays fp32, because scores must
// rank as on every other runtime.
#include "cuda/block.cuh"
#include "cuda/kernels.h"
#include "cuda/tensor.cuh"

namespace vtexport::cuda {
namespace {

constexpr int kSide = 16;       // rows of a product on tensor cores
constexpr int kMostRows = 64;   // rows that count, per block
constexpr int kMostBlocks = 8;  // per cluster; every GPU that has clusters has these
constexpr int kFewKeys = 192;   // keys per block that are worth no further block
constexpr int kFewBlocks = 160;  // about the multiprocessors of the largest GPUs
constexpr int kMostBuffers = 3;
constexpr int kSplit = 64;      // keys per block where they are read twice
constexpr int kColumns = 32;    // columns per block of the last launch
template <typename T>
constexpr int kKeys = sizeof(T) == 2 ? 64 : 32;  // keys that are multiplied at a time

// Elements from one row of a tile to the next. Products run over whole multiples of 16 (a tensor core's depth) or 4 (a
// vector); sixteen bytes more put neighbouring rows into different banks.
template <typename T>
__host__ __device__ constexpr int depth(int size) {
  return sizeof(T) == 2 ? (size + 15) / 16 * 16 : (size + 3) / 4 * 4;
}
template <typename T>
__host__ __device__ constexpr int stride(int size) {
  return depth<T>(size) + 16 / static_cast<int>(sizeof(T));
}
// Logits from one row to the next: eight rows of eight neighbours, or four of eight, lie in different banks.
__host__ __device__ constexpr int row_of_logits(int span) { return (span + 31) / 32 * 32 + 8; }

// How a problem is divided among blocks. Only the buffers, which no sum notices, depend on the batch.
struct Cut {
  int rows, groups;   // that count, per block; a multiple of 16
  int span, blocks;   // keys per block; a multiple of 16
  int buffers;        // tiles of keys in shared memory: one is multiplied while the others are copied
};

// At the beginning of a block's shared memory.
struct Header {
  int32_t place[kMostRows];  // -1: no such row
  int32_t last[kMostRows];   // the last key that it sees; -1: no such row
  float factor[kMostRows];   // by which a row's exponentials become attention
  float2 extent[kMostRows];  // of the block's keys, or of all: the greatest logit, the sum of exp2(logit - greatest)
  float sum_of_warp[kBlock / kWarp];
  int32_t of_warp[kBlock / kWarp];
};
constexpr size_t kHeader = (sizeof(Header) + 127) / 128 * 128;

template <typename T>
size_t shared_size(const Cut& cut, int size) {
  return kHeader + cut.rows * row_of_logits(cut.span) * sizeof(float) +
         static_cast<size_t>(cut.rows + cut.buffers * kKeys<T>) * stride<T>(size) * sizeof(T);
}

// Begins to copy `count` rows into a tile; row_of(i) is the row of `from` [., size] to copy, -1 for zeros.
template <typename T, typename RowOf>
__device__ __forceinline__ void copy_rows(T* tile, int count, const T* from, int size, RowOf row_of) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(T));
  const int wide = depth<T>(size), step = stride<T>(size), thread = static_cast<int>(threadIdx.x);
  if (size % kVector == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
    const int pieces = ceil_div(wide, kVector);
    int row = thread / pieces, piece = thread % pieces;
    while (row < count) {
      const int source = row_of(row);
      const bool wanted = source >= 0 && piece * kVector < size;
      const T* at = wanted ? from + static_cast<int64_t>(source) * size + piece * kVector : from;
      copy16(tile + row * step + piece * kVector, at, wanted);
      row += kBlock / pieces;
      piece += kBlock % pieces;
      if (piece >= pieces) {
        piece -= pieces;
        ++row;
      }
    }
    return;
  }
#pragma unroll 1
  for (int i = thread; i < count * wide; i += kBlock) {
    const int row = i / wide, d = i % wide;
    const int source = row_of(row);
    tile[row * step + d] = source >= 0 && d < size ? from[static_cast<int64_t>(source) * size + d] : zero_of<T>();
  }
}

// logits[r * row_of_logits + k] = queries[r] · keys[k] for `rows` rows and at least the first `wanted` of kKeys keys.
template <typename T>
__device__ __forceinline__ void multiply_tile(const T* queries, const T* keys, int size, int rows, int wanted,
                                              float* logits, int row_step) {
  const int step = stride<T>(size), wide = depth<T>(size);
  if constexpr (sizeof(T) == 2 && kTensorCores<T>) {
    // Eight warps: each has sixteen keys and every other sixteen rows.
    const int first = warp_number() % 4 * kSide, half = warp_number() / 4;
    if (first >= wanted || half * kSide >= rows) return;
    const bool both = (half + 2) * kSide < rows;
    Sum16x8 sum[2][2] = {};
    const T *key = keys + first * step, *upper = queries + half * kSide * step, *lower = upper + 2 * kSide * step;
#pragma unroll 4
    for (int d = 0; d < wide; d += 16) {
      const Tile16 b = load_tile(key + d, step);
      const Tile16 a = load_tile(upper + d, step);
      multiply<T>(sum[0][0], a, b, 0);
      multiply<T>(sum[0][1], a, b, 1);
      if (both) {
        const Tile16 c = load_tile(lower + d, step);
        multiply<T>(sum[1][0], c, b, 0);
        multiply<T>(sum[1][1], c, b, 1);
      }
    }
    float* own = logits + (half * kSide + lane_number() / 4) * row_step + first + 2 * (lane_number() % 4);
    for (int i = 0; i < 2; ++i) {
      if (i == 1 && !both) break;
      for (int j = 0; j < 2; ++j) {
        float* at = own + i * 2 * kSide * row_step + 8 * j;
        *reinterpret_cast<float2*>(at) = make_float2(sum[i][j].x[0], sum[i][j].x[1]);
        *reinterpret_cast<float2*>(at + 8 * row_step) = make_float2(sum[i][j].x[2], sum[i][j].x[3]);
      }
    }
  } else {
    // A thread has two rows and every eighth key.
    constexpr int kEach = kKeys<T> / 8, kApart = kBlock / 8;
    const int row = static_cast<int>(threadIdx.x) / 8, column = static_cast<int>(threadIdx.x) % 8;
    if (row >= rows) return;
    const bool both = row + kApart < rows;
    float sum[2][kEach] = {};
    const T *upper = queries + row * step, *lower = both ? upper + kApart * step : upper, *key = keys + column * step;
    if constexpr (sizeof(T) == 4) {
      for (int d = 0; d < wide; d += 4) {
        const float4 x = *reinterpret_cast<const float4*>(upper + d), y = *reinterpret_cast<const float4*>(lower + d);
        for (int j = 0; j < kEach; ++j) {
          const float4 k = *reinterpret_cast<const float4*>(key + 8 * j * step + d);
          sum[0][j] = fmaf(x.w, k.w, fmaf(x.z, k.z, fmaf(x.y, k.y, fmaf(x.x, k.x, sum[0][j]))));
          sum[1][j] = fmaf(y.w, k.w, fmaf(y.z, k.z, fmaf(y.y, k.y, fmaf(y.x, k.x, sum[1][j]))));
        }
      }
    } else {
      for (int d = 0; d < wide; ++d) {
        const float x = to_float(upper[d]), y = to_float(lower[d]);
        for (int j = 0; j < kEach; ++j) {
          const float k = to_float(key[8 * j * step + d]);
          sum[0][j] = fmaf(x, k, sum[0][j]);
          sum[1][j] = fmaf(y, k, sum[1][j]);
        }
      }
    }
    for (int j = 0; j < kEach; ++j) {
      if (column + 8 * j >= wanted) break;
      logits[row * row_step + column + 8 * j] = sum[0][j];
      if (both) logits[(row + kApart) * row_step + column + 8 * j] = sum[1][j];
    }
  }
}

// One block: a group of the rows that count, of one head and batch, and some keys.
template <typename T>
struct Work {
  const ScoreProblem& p;
  const Cut& cut;
  Header& head;
  float* logits;
  T *queries, *tiles;
  const T *query, *key;
  int begin, count;  // the block's keys; columns before the first key or behind the last are none
  int number;        // the rows that count, in all groups

  __device__ Work(const ScoreProblem& problem, const Cut& how, const T* all_queries, const T* all_keys)
      : p(problem), cut(how), head(*reinterpret_cast<Header*>(dynamic_shared())) {
    logits = reinterpret_cast<float*>(dynamic_shared() + kHeader);
    queries = reinterpret_cast<T*>(logits + cut.rows * row_of_logits(cut.span));
    tiles = queries + cut.rows * stride<T>(p.size);
    const int64_t h = blockIdx.y, b = blockIdx.z;
    query = all_queries + (b * p.heads + h) * p.rows * p.size;
    key = all_keys + (b * p.kv_heads + h / (p.heads / p.kv_heads)) * p.keys * p.size;
  }

  __device__ int group() const { return static_cast<int>(blockIdx.x) / cut.blocks; }
  __device__ int part() const { return static_cast<int>(blockIdx.x) % cut.blocks; }
  // How many rows of this group count.
  __device__ int own_rows() const { return min(cut.rows, number - group() * cut.rows); }

  // Begins to copy a tile of keys, if there is one of that number.
  __device__ void copy_tile(int tile) {
    const int first = begin + tile * kKeys<T>, end = min(begin + count, p.keys);
    if (tile * kKeys<T> < count) {
      copy_rows(tiles + tile % cut.buffers * kKeys<T> * stride<T>(p.size), kKeys<T>, key, p.size,
                [=](int k) { return first + k >= 0 && first + k < end ? first + k : -1; });
    }
    commit_copies();
  }

  // Begins to copy the first keys, finds the rows, and begins to copy them and more keys; false if no row of this group
  // counts.
  __device__ bool find_rows(const int64_t* places, int first_key, int keys) {
    begin = first_key;
    count = keys;
    copy_tile(0);
    const int thread = static_cast<int>(threadIdx.x);
    if (thread < kMostRows) head.place[thread] = head.last[thread] = -1;
    const int before_group = group() * cut.rows;
    places += static_cast<int64_t>(blockIdx.z) * p.rows;
    number = 0;
    for (int base = 0; base < p.rows; base += kBlock) {
      const int row = base + thread;
      const int64_t last = row < p.rows ? places[row] : -1;
      const unsigned ballot = __ballot_sync(kAllLanes, last >= 0);
      if (lane_number() == 0) head.of_warp[warp_number()] = __popc(ballot);
      __syncthreads();
      int own = number + __popc(ballot & ((1u << lane_number()) - 1u)) - before_group;
      for (int warp = 0; warp < kBlock / kWarp; ++warp) {
        if (warp < warp_number()) own += head.of_warp[warp];
        number += head.of_warp[warp];
      }
      if (last >= 0 && own >= 0 && own < cut.rows) {
        head.place[own] = row;
        head.last[own] = last < p.keys ? static_cast<int32_t>(last) : p.keys - 1;
      }
      __syncthreads();
    }
    if (number <= before_group) {
      wait_copies<0>();
      return false;
    }
    const int32_t* place = head.place;
    copy_rows(queries, cut.rows, query, p.size, [=](int r) { return place[r]; });
    commit_copies();
#pragma unroll 1
    for (int tile = 1; tile < cut.buffers; ++tile) copy_tile(tile);
    return true;
  }

  // The logits of the block's keys, not yet scaled.
  __device__ void multiply_keys() {
    const int number_tiles = ceil_div(count, kKeys<T>);
    for (int tile = 0; tile < number_tiles; ++tile) {
      // As many tiles as there are buffers are on their way. This one is the oldest, and the rows are older than the next.
      if (cut.buffers == 3) {
        wait_copies<2>();
      } else if (cut.buffers == 2) {
        wait_copies<1>();
      } else {
        wait_copies<0>();
      }
      __syncthreads();
      const int first = tile * kKeys<T>;
      multiply_tile(queries, tiles + tile % cut.buffers * kKeys<T> * stride<T>(p.size), p.size, cut.rows, count - first,
                    logits + first, row_of_logits(cut.span));
      __syncthreads();
      copy_tile(tile + cut.buffers);
    }
    wait_copies<0>();
  }

  // Turns each row's logits into exp2(logit · scale - greatest), zero for keys that it does not see. `greatest` is that
  // of the block's keys, which is then written with the sum into head.extent, or, where kKnown, already there.
  template <bool kKnown>
  __device__ void take_exponentials() {
    const float scale = p.scale * 1.44269504f;  // exp(x) = exp2(x / ln 2)
    const int part = lane_number() % 8, first = begin < 0 ? -begin : 0;
    for (int r = static_cast<int>(threadIdx.x) / 8; r < cut.rows; r += kBlock / 8) {
      float* row = logits + r * row_of_logits(cut.span);
      const int seen = min(count, head.last[r] + 1 - begin);
      float greatest = -kInfinity, sum = 0;
      if constexpr (kKnown) {
        greatest = head.extent[r].x;
      } else {
#pragma unroll 4
        for (int k = part; k < seen; k += 8) greatest = fmaxf(greatest, row[k] * scale);
        for (int step = 4; step > 0; step /= 2) greatest = fmaxf(greatest, __shfl_xor_sync(kAllLanes, greatest, step));
      }
#pragma unroll 4
      for (int k = part; k < count; k += 8) {
        const float logit = row[k] * scale;
        // A logit of minus infinity among others adds nothing; NaN makes the sum NaN.
        const bool adds = k >= first && k < seen && (isnan(logit) || greatest > -kInfinity);
        const float exponential = adds ? exp2f(logit - greatest) : 0.0f;
        row[k] = exponential;
        sum += exponential;
      }
      if constexpr (!kKnown) {
        for (int step = 4; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
        if (part == 0) head.extent[r] = make_float2(greatest, sum);
      }
    }
  }

  // Adds up the block's visual columns over its rows, from visual column `column` = key `origin` on.
  __device__ void add_rows(int origin, const float* divisor, float* partial, float* totals) {
    const int rows = own_rows();
    float total = 0;
    for (int k = static_cast<int>(threadIdx.x); k < count; k += kBlock) {
      const int key_number = begin + k, column = key_number - origin;
      if (column < 0 || column >= p.visual) continue;
      float sum = 0;
      // A column that is not seen stays zero, whatever the row's sum is.
      auto weight = [&](int r) {
        const bool seen = key_number >= 0 && key_number <= head.last[r];
        return seen ? logits[r * row_of_logits(cut.span) + k] * head.factor[r] : 0.0f;
      };
      if (divisor == nullptr) {
#pragma unroll 8
        for (int r = 0; r < rows; ++r) sum += weight(r);
      } else {
        const float* own = divisor + static_cast<int64_t>(blockIdx.z) * p.rows * p.visual + column;
#pragma unroll 2
        for (int r = 0; r < rows; ++r) sum += weight(r) / own[static_cast<int64_t>(head.place[r]) * p.visual];
      }
      sum /= static_cast<float>(number);
      partial[column] = sum;
      total += sum;
    }
    if (totals == nullptr) return;
    total = warp_sum(total);
    if (lane_number() == 0) head.sum_of_warp[warp_number()] = total;
    __syncthreads();
    if (threadIdx.x != 0) return;
    total = 0;
    for (float part_of_total : head.sum_of_warp) total += part_of_total;
    totals[part()] = total;
  }

  // The number of this head and group among all.
  __device__ int64_t own_group(int groups) const {
    return (static_cast<int64_t>(blockIdx.z) * p.heads + blockIdx.y) * groups + group();
  }
};

// The first visual column's key, moved so that all columns stay outside the keys if they were.
__device__ inline int first_column(const ScoreProblem& p, const int64_t* start) {
  const int64_t first = start[blockIdx.z];
  return static_cast<int>(first < -p.visual ? -p.visual : first > p.keys ? p.keys : first);
}

// partial [batch, heads, groups, visual]: the columns' attention, over each group's rows, times the share of a row.
// totals [batch, heads, groups, blocks], or null: the sums of each block's columns. A cluster has all keys.
template <typename T>
__global__ void __launch_bounds__(kBlock, 2) attend(ScoreProblem p, Cut cut, const T* query, const T* key,
                                                    const int64_t* places, const int64_t* start, const float* divisor,
                                                    float* partial, float* totals) {
  let_next_begin();
  Work<T> work(p, cut, query, key);
  const int first = work.part() * cut.span, thread = static_cast<int>(threadIdx.x);
  const bool some = work.find_rows(places, first, max(0, min(cut.span, p.keys - first)));
  const int origin = first_column(p, start);
  const int64_t own = work.own_group(cut.groups);
  partial += own * p.visual;
  if (totals != nullptr) totals += own * cut.blocks;
  // Columns of no key have no block of their own.
  if (work.part() == 0 && (!some || origin < 0 || origin + p.visual > p.keys)) {
    for (int column = thread; column < p.visual; column += kBlock) {
      if (!some || origin + column < 0 || origin + column >= p.keys) partial[column] = 0;
    }
  }
  if (!some) {  // in all blocks of the cluster
    if (totals != nullptr && thread == 0) totals[work.part()] = 0;
    return;
  }
  work.multiply_keys();
  work.template take_exponentials<false>();
  cluster_arrive();
  cluster_wait();
  if (thread < cut.rows) {
    float2 extent[kMostBlocks];
    float greatest = -kInfinity, sum = 0;
#pragma unroll
    for (int block = 0; block < kMostBlocks; ++block) {
      if (block < cut.blocks) extent[block] = load_of_rank(&work.head.extent[thread], static_cast<unsigned>(block));
    }
#pragma unroll
    for (int block = 0; block < kMostBlocks; ++block) {
      if (block < cut.blocks) greatest = fmaxf(greatest, extent[block].x);
    }
#pragma unroll
    for (int block = 0; block < kMostBlocks; ++block) {
      if (block >= cut.blocks) continue;
      if (extent[block].x > -kInfinity) sum += extent[block].y * exp2f(extent[block].x - greatest);
      if (isnan(extent[block].y)) sum = extent[block].y;
    }
    // A block whose keys add nothing has only zeros; a row without any finite sum is NaN in all its columns.
    const float mine = work.head.extent[thread].x;
    const bool adds = mine > -kInfinity || !(greatest > -kInfinity) || isnan(sum);
    work.head.factor[thread] = adds ? exp2f(mine - greatest) / sum : 0.0f;
  }
  cluster_arrive();  // this block has read what it needs of the others
  __syncthreads();
  work.add_rows(origin, divisor, partial, totals);
  cluster_wait();  // and the others have read theirs before it ends
}

// extents [batch, heads, groups, blocks, rows]: of each block's keys.
template <typename T>
__global__ void __launch_bounds__(kBlock, 2) measure(ScoreProblem p, Cut cut, const T* query, const T* key,
                                                     const int64_t* places, float2* extents) {
  let_next_begin();
  Work<T> work(p, cut, query, key);
  const int first = work.part() * cut.span, thread = static_cast<int>(threadIdx.x);
  if (!work.find_rows(places, first, min(cut.span, p.keys - first))) return;  // its extents are never read
  work.multiply_keys();
  work.template take_exponentials<false>();
  __syncthreads();
  extents += (work.own_group(cut.groups) * cut.blocks + work.part()) * cut.rows;
  if (thread < cut.rows) extents[thread] = work.head.extent[thread];
}

// The same columns as of `attend`, from extents; `splits` are the blocks that wrote those. totals [batch, heads,
// groups, blocks].
template <typename T>
__global__ void __launch_bounds__(kBlock, 2) add_columns(ScoreProblem p, Cut cut, int splits, const T* query,
                                                         const T* key, const int64_t* places, const int64_t* start,
                                                         const float* divisor, const float2* extents, float* partial,
                                                         float* totals) {
  let_next_begin();
  Work<T> work(p, cut, query, key);
  const int before = work.part() * cut.span, origin = first_column(p, start), thread = static_cast<int>(threadIdx.x);
  const int64_t own = work.own_group(cut.groups);
  partial += own * p.visual;
  if (totals != nullptr) totals += own * cut.blocks;
  const int columns = min(cut.span, p.visual - before);
  if (!work.find_rows(places, origin + before, columns)) {
    wait_for_previous();
    for (int column = thread; column < columns; column += kBlock) partial[before + column] = 0;
    if (totals != nullptr && thread == 0) totals[work.part()] = 0;
    return;
  }
  work.multiply_keys();
  wait_for_previous();
  if (thread < cut.rows) {
    const float2* of_split = extents + own * splits * cut.rows + thread;
    float greatest = -kInfinity, sum = 0;
#pragma unroll 4
    for (int s = 0; s < splits; ++s) greatest = fmaxf(greatest, of_split[s * cut.rows].x);
#pragma unroll 4
    for (int s = 0; s < splits; ++s) {
      const float2 extent = of_split[s * cut.rows];
      if (extent.x > -kInfinity) sum += extent.y * exp2f(extent.x - greatest);
      if (isnan(extent.y)) sum = extent.y;
    }
    work.head.extent[thread] = make_float2(greatest, sum);
    work.head.factor[thread] = greatest > -kInfinity || isnan(sum) ? 1.0f / sum : __builtin_nanf("");
  }
  __syncthreads();
  work.template take_exponentials<true>();
  __syncthreads();
  work.add_rows(origin, divisor, partial, totals);
}

// score [batch, visual]: the mean over all heads, or with `totals` [batch, heads, parts] over those whose sum of parts is
// greatest.
__global__ void __launch_bounds__(kBlock) mean_of_heads(ScoreProblem p, int groups, int parts, const float* partial,
                                                        const float* totals, float* score) {
  constexpr int kParts = kBlock / kColumns;
  __shared__ float sums[kParts][kColumns];
  wait_for_previous();
  float* total = reinterpret_cast<float*>(dynamic_shared());  // of each head
  const int64_t b = blockIdx.y;
  if (totals != nullptr) {
    for (int h = static_cast<int>(threadIdx.x); h < p.heads; h += kBlock) {
      float sum = 0;
      for (int i = 0; i < parts; ++i) sum += totals[(b * p.heads + h) * parts + i];
      total[h] = ranked(sum);
    }
    __syncthreads();
  }
  const int column = static_cast<int>(threadIdx.x) % kColumns, part = static_cast<int>(threadIdx.x) / kColumns;
  const int v = static_cast<int>(blockIdx.x) * kColumns + column;
  partial += b * p.heads * groups * p.visual;
  float sum = 0;
  for (int h = part; h < p.heads; h += kParts) {
    if (totals != nullptr && rank_of(total, p.heads, h) >= p.best_heads) continue;
    if (v >= p.visual) continue;
    for (int g = 0; g < groups; ++g) sum += partial[(static_cast<int64_t>(h) * groups + g) * p.visual + v];
  }
  sums[part][column] = sum;
  __syncthreads();
  if (part != 0 || v >= p.visual) return;
  for (int other = 1; other < kParts; ++other) sum += sums[other][column];
  score[b * p.visual + v] = sum / static_cast<float>(totals == nullptr ? p.heads : p.best_heads);
}

// The arrays in the workspace, as large as any cut may need: the size does not depend on the GPU.
struct Workspace {
  float2* extents;
  float *partial, *totals;
  size_t bytes;

  Workspace(const ScoreProblem& p, void* memory) {
    const size_t heads = static_cast<size_t>(p.batch) * p.heads, groups = ceil_div(p.rows, kSide);
    const size_t parts = kMostBlocks + ceil_div(p.visual, kSplit);
    // The last group may not be full.
    const size_t rows = static_cast<size_t>(p.rows) + kMostRows - 1, splits = ceil_div(p.keys, kSplit);
    const size_t first = heads * splits * rows * sizeof(float2);
    const size_t second = heads * groups * p.visual * sizeof(float);
    char* place = static_cast<char*>(memory);
    extents = reinterpret_cast<float2*>(place);
    partial = reinterpret_cast<float*>(place + first);
    totals = reinterpret_cast<float*>(place + first + second);
    bytes = first + second + heads * groups * parts * sizeof(float);
  }
};

// As many rows per block, and then buffers, as shared memory has room for; false if there is none.
template <typename T>
bool fit(Cut& cut, const ScoreProblem& p, size_t most_shared) {
  const int tiles = ceil_div(cut.span, kKeys<T>), least = ceil_div(p.rows, kMostRows);  // least groups, of equal size
  for (cut.rows = ceil_div(ceil_div(p.rows, least), kSide) * kSide; cut.rows > 0; cut.rows -= kSide) {
    cut.groups = ceil_div(p.rows, cut.rows);
    for (cut.buffers = tiles < kMostBuffers ? tiles : kMostBuffers; cut.buffers > 0; --cut.buffers) {
      if (shared_size<T>(cut, p.size) <= most_shared) return true;
    }
  }
  return false;
}

// One pass over the keys, if a cluster of at most `most_blocks` has room for their logits.
template <typename T>
bool cut_once(Cut& cut, const ScoreProblem& p, int most_blocks, size_t most_shared) {
  cut.blocks = 1;
  while (cut.blocks < most_blocks && ceil_div(p.keys, cut.blocks) > kFewKeys) cut.blocks *= 2;
  cut.span = ceil_div(ceil_div(p.keys, cut.blocks), kSide) * kSide;
  if (!fit<T>(cut, p, most_shared)) return false;
  // One block for many rows and keys leaves most of a GPU idle.
  return most_blocks > 1 || p.rows <= kSide || p.keys <= kFewKeys;
}

template <typename T>
void run(Launcher& on, const ScoreProblem& p, const T* query, const T* key, const int64_t* places, const int64_t* start,
         const float* divisor, float* score, const Workspace& w) {
  const size_t most = on.most_shared();
  const int most_blocks = on.architecture(attend<T>) >= 90 ? kMostBlocks : 1;
  const unsigned heads = static_cast<unsigned>(p.heads), batch = static_cast<unsigned>(p.batch);
  float* totals = p.best_heads > 0 ? w.totals : nullptr;
  // Where every block has a multiprocessor to itself, all its keys may be on their way at once; elsewhere, two share one.
  auto share = [&](Cut& cut) {
    const int64_t all = static_cast<int64_t>(p.batch) * p.heads * cut.groups * cut.blocks;
    if (all > kFewBlocks && cut.buffers > 2) cut.buffers = 2;
  };
  auto launch = [&](const Cut& cut) {
    return Launch{dim3(static_cast<unsigned>(cut.groups * cut.blocks), heads, batch), kBlock, shared_size<T>(cut, p.size)};
  };
  Cut cut;
  bool once = cut_once<T>(cut, p, most_blocks, most);
  if (once) {
    Launch all = launch(cut);
    all.cluster = static_cast<unsigned>(cut.blocks);
    once = on.has_room(attend<T>, all);  // whatever the batch
    share(cut);
    all.shared = shared_size<T>(cut, p.size);
    if (once) on.run(attend<T>, all, p, cut, query, key, places, start, divisor, w.partial, totals);
  }
  if (!once) {
    cut.span = kSplit;
    cut.blocks = ceil_div(p.keys, kSplit);
    fit<T>(cut, p, most);  // if nothing fits, the launch fails
    on.run(measure<T>, launch(cut), p, cut, query, key, places, w.extents);
    const int splits = cut.blocks;
    cut.blocks = ceil_div(p.visual, kSplit);
    Launch columns = launch(cut);
    columns.early = true;
    on.run(add_columns<T>, columns, p, cut, splits, query, key, places, start, divisor, w.extents, w.partial, totals);
  }
  Launch mean{dim3(static_cast<unsigned>(ceil_div(p.visual, kColumns)), batch), kBlock};
  mean.shared = totals == nullptr ? 0 : heads * sizeof(float);
  mean.early = true;
  on.run(mean_of_heads, mean, p, cut.groups, cut.groups * cut.blocks, w.partial, totals, score);
}

}  // namespace

size_t workspace_size(const ScoreProblem& p) { return Workspace(p, nullptr).bytes; }

cudaError_t token_score(const ScoreProblem& p, const void* query, const void* key, const int64_t* places,
                        const int64_t* start, const float* divisor, float* score, void* workspace,
                        cudaStream_t stream) {
  if (p.refusal() != nullptr) return cudaErrorInvalidValue;
  if (p.batch == 0) return cudaSuccess;
  const Workspace w(p, workspace);
  Launcher on(stream);
  for_type<__half, __nv_bfloat16>(p.type, [&](auto zero) {
    using T = decltype(zero);
    run<T>(on, p, static_cast<const T*>(query), static_cast<const T*>(key), places, start, divisor, score, w);
  });
  return on.error();
}

}  // namespace vtexport::cuda
