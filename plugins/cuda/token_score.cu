// TokenScore in three launches, so that a batch of one fills a GPU: (1) the greatest logit and the sum of exponentials
// of each row over 128 keys at a time; (2) the visual columns again, weighted by those and added up over sixteen rows;
// (3) the mean over heads and tiles of rows. Attention itself is never written; every sum has a fixed order, whatever
// the batch. fp16 and bf16 products run on tensor cores with fp32 accumulation; fp32 stays fp32, because scores must
// rank as on every other runtime.
#include "cuda/block.cuh"
#include "cuda/kernels.h"

namespace vtexport::cuda {
namespace {

constexpr int kRows = 16;  // rows that count, per block
constexpr int kThreads = 128;
constexpr int kResident = 6;  // blocks per multiprocessor; without it, the compiler spills registers to fit more
constexpr int kSplit = 128;    // keys that are summed together
constexpr int kColumns = 32;   // columns per block of the last launch
template <typename T>
constexpr int kKeys = sizeof(T) == 2 ? 64 : 32;  // keys in shared memory at a time

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

int row_tiles(const ScoreProblem& p) { return ceil_div(p.rows, kRows); }
int splits(const ScoreProblem& p) { return ceil_div(p.keys, kSplit); }

// The dynamic shared memory of a block: logits [kRows, columns], then the tiles.
template <typename T>
size_t shared_size(const ScoreProblem& p, int columns) {
  return kRows * columns * sizeof(float) + static_cast<size_t>(kRows + kKeys<T>) * stride<T>(p.size) * sizeof(T);
}

template <typename T>
struct Tiles {
  float* logits;
  T *queries, *keys;

  __device__ Tiles(int columns, int size) {
    logits = reinterpret_cast<float*>(dynamic_shared());
    queries = reinterpret_cast<T*>(logits + kRows * columns);
    keys = queries + kRows * stride<T>(size);
  }
};

// Sixteen of the rows that count, from number 16 * tile on, in order.
struct Rows {
  int32_t place[kRows];  // -1: no such row
  int32_t last[kRows];   // the last key that it sees
  int32_t number;        // how many count in all

  // All threads must call it; one warp does the work.
  __device__ void find(const bool* counts, const int64_t* places, int32_t rows, int32_t keys, int tile) {
    if (warp_number() == 0) {
      const int lane = lane_number();
      if (lane < kRows) place[lane] = last[lane] = -1;
      __syncwarp();
      int32_t seen = 0;
      for (int base = 0; base < rows; base += kWarp) {
        const int row = base + lane;
        const bool wanted = row < rows && counts[row];
        const unsigned ballot = __ballot_sync(kAllLanes, wanted);
        const int32_t own = seen + __popc(ballot & ((1u << lane) - 1u)) - tile * kRows;
        if (wanted && own >= 0 && own < kRows) {
          const int64_t end = keys - 1;
          place[own] = row;
          last[own] = static_cast<int32_t>(places[row] < -1 ? -1 : places[row] < end ? places[row] : end);
        }
        seen += __popc(ballot);
      }
      if (lane == 0) number = seen;
    }
    __syncthreads();
  }

  __device__ int32_t end() const {
    int32_t found = 0;
    for (int r = 0; r < kRows; ++r) found = last[r] + 1 > found ? last[r] + 1 : found;
    return found;
  }
};

// Copies `count` rows into a tile; row_of(i) is the row of `from` [., size] to copy, -1 for zeros.
template <typename T, typename RowOf>
__device__ void load_rows(T* tile, int count, const T* from, int size, RowOf row_of) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(T));
  const int wide = depth<T>(size);
  if (size % kVector == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
    const int pieces = wide / kVector;
    for (int i = static_cast<int>(threadIdx.x); i < count * pieces; i += kThreads) {
      const int row = i / pieces, d = i % pieces * kVector;
      const int64_t source = row_of(row);
      uint4 piece = make_uint4(0, 0, 0, 0);
      if (source >= 0 && d < size) piece = *reinterpret_cast<const uint4*>(from + source * size + d);
      *reinterpret_cast<uint4*>(tile + row * stride<T>(size) + d) = piece;
    }
    return;
  }
  for (int i = static_cast<int>(threadIdx.x); i < count * wide; i += kThreads) {
    const int row = i / wide, d = i % wide;
    const int64_t source = row_of(row);
    tile[row * stride<T>(size) + d] = source >= 0 && d < size ? from[source * size + d] : zero_of<T>();
  }
}

// logits[r * columns + k] = queries[r] · keys[k] for kRows rows and kKeys keys.
template <typename T>
__device__ void multiply(const Tiles<T>& tiles, int size, float* logits, int columns) {
  const int step = stride<T>(size), wide = depth<T>(size);
  if constexpr (kTensorCores<T>) {
    using namespace nvcuda;
    const int first = warp_number() * 16;
    wmma::fragment<wmma::accumulator, 16, 16, 16, float> sum;
    wmma::fill_fragment(sum, 0.0f);
    for (int d = 0; d < wide; d += 16) {
      wmma::fragment<wmma::matrix_a, 16, 16, 16, T, wmma::row_major> a;
      wmma::fragment<wmma::matrix_b, 16, 16, 16, T, wmma::col_major> b;
      wmma::load_matrix_sync(a, tiles.queries + d, step);
      wmma::load_matrix_sync(b, tiles.keys + first * step + d, step);
      wmma::mma_sync(sum, a, b, sum);
    }
    wmma::store_matrix_sync(logits + first, sum, columns, wmma::mem_row_major);
  } else {
    for (int i = static_cast<int>(threadIdx.x); i < kRows * kKeys<T>; i += kThreads) {
      const int row = i / kKeys<T>, key = i % kKeys<T>;
      const T *a = tiles.queries + row * step, *b = tiles.keys + key * step;
      float sum = 0;
      if constexpr (sizeof(T) == 4) {
        for (int d = 0; d < wide; d += 4) {
          const float4 x = *reinterpret_cast<const float4*>(a + d), y = *reinterpret_cast<const float4*>(b + d);
          sum += x.x * y.x;
          sum += x.y * y.y;
          sum += x.z * y.z;
          sum += x.w * y.w;
        }
      } else {
        for (int d = 0; d < wide; ++d) sum += to_float(a[d]) * to_float(b[d]);
      }
      logits[row * columns + key] = sum;
    }
  }
}

// Where block (tile, head, batch) finds its rows and keys.
template <typename T>
struct Source {
  const T *query, *key;
  const bool* counts;
  const int64_t* places;

  __device__ Source(const ScoreProblem& p, const void* queries, const void* keys, const bool* all_counts,
                    const int64_t* all_places, int64_t head, int64_t b) {
    query = static_cast<const T*>(queries) + (b * p.heads + head) * p.rows * p.size;
    key = static_cast<const T*>(keys) + (b * p.kv_heads + head / (p.heads / p.kv_heads)) * p.keys * p.size;
    counts = all_counts + b * p.rows;
    places = all_places + b * p.rows;
  }
};

// The greatest logit of a row and its sum of exp(logit - greatest), over one split of the keys.
struct Extent {
  float greatest, sum;
};

// extents [batch, heads, tiles, splits, kRows]
template <typename T>
__global__ void __launch_bounds__(kThreads, kResident) measure(ScoreProblem p, int tiles_of_rows, const void* queries,
                                                    const void* keys, const bool* counts, const int64_t* places,
                                                    Extent* extents) {
  __shared__ Rows rows;
  const int tile = static_cast<int>(blockIdx.x) % tiles_of_rows, split = static_cast<int>(blockIdx.x) / tiles_of_rows;
  const int number_splits = static_cast<int>(gridDim.x) / tiles_of_rows;
  const Source<T> from(p, queries, keys, counts, places, blockIdx.y, blockIdx.z);
  rows.find(from.counts, from.places, p.rows, p.keys, tile);
  if (rows.number <= tile * kRows) return;  // its extents are never read
  const Tiles<T> tiles(kSplit, p.size);
  const int begin = split * kSplit, seen = min(rows.end(), begin + kSplit);
  load_rows(tiles.queries, kRows, from.query, p.size, [&](int r) { return static_cast<int64_t>(rows.place[r]); });
  for (int first = begin; first < seen; first += kKeys<T>) {
    load_rows(tiles.keys, kKeys<T>, from.key, p.size,
              [&](int k) { return static_cast<int64_t>(first + k < p.keys ? first + k : -1); });
    __syncthreads();
    multiply(tiles, p.size, tiles.logits + (first - begin), kSplit);
    __syncthreads();
  }
  Extent* out = extents + ((static_cast<int64_t>(blockIdx.z) * p.heads + blockIdx.y) * tiles_of_rows + tile) *
                              number_splits * kRows + split * kRows;
  for (int r = warp_number(); r < kRows; r += kThreads / kWarp) {
    float logit[kSplit / kWarp], greatest = -kInfinity;
    for (int i = 0; i < kSplit / kWarp; ++i) {
      const int key = i * kWarp + lane_number();
      logit[i] = begin + key <= rows.last[r] ? tiles.logits[r * kSplit + key] * p.scale : -kInfinity;
      greatest = fmaxf(greatest, logit[i]);
    }
    greatest = warp_max(greatest);
    float sum = 0;
    for (int i = 0; i < kSplit / kWarp; ++i) {
      // A key that is not seen, or whose logit is minus infinity among others, adds nothing; NaN makes the sum NaN.
      if (isnan(logit[i]) || greatest > -kInfinity) sum += expf(logit[i] - greatest);
    }
    sum = warp_sum(sum);
    if (lane_number() == 0) out[r] = {greatest, sum};
  }
}

// partial [batch, heads, tiles, visual]: the columns' attention, over each tile's rows, times the share of a row.
template <typename T>
__global__ void __launch_bounds__(kThreads, kResident) add_rows(ScoreProblem p, int tiles_of_rows, int number_splits,
                                                     const void* queries, const void* keys, const bool* counts,
                                                     const int64_t* places, const int64_t* start, const float* divisor,
                                                     const Extent* extents, float* partial) {
  constexpr int kParts = kThreads / kKeys<T>;  // threads that share a column's rows
  __shared__ Rows rows;
  __shared__ Extent whole[kRows];
  __shared__ float sums[kParts][kKeys<T>];
  const int tile = static_cast<int>(blockIdx.x) % tiles_of_rows;
  const int first = static_cast<int>(blockIdx.x) / tiles_of_rows * kKeys<T>;
  const Source<T> from(p, queries, keys, counts, places, blockIdx.y, blockIdx.z);
  rows.find(from.counts, from.places, p.rows, p.keys, tile);
  const int64_t own = (static_cast<int64_t>(blockIdx.z) * p.heads + blockIdx.y) * tiles_of_rows + tile;
  const int part = static_cast<int>(threadIdx.x) / kKeys<T>, column = static_cast<int>(threadIdx.x) % kKeys<T>;
  const bool inside = first + column < p.visual;
  partial += own * p.visual + first;
  if (rows.number <= tile * kRows) {
    if (part == 0 && inside) partial[column] = 0;
    return;
  }
  const Tiles<T> tiles(kKeys<T>, p.size);
  const int64_t origin = start[blockIdx.z] + first;
  load_rows(tiles.queries, kRows, from.query, p.size, [&](int r) { return static_cast<int64_t>(rows.place[r]); });
  load_rows(tiles.keys, kKeys<T>, from.key, p.size, [&](int k) {
    return first + k < p.visual && origin + k >= 0 && origin + k < p.keys ? origin + k : static_cast<int64_t>(-1);
  });
  if (threadIdx.x < kRows) {
    const Extent* of_split = extents + own * number_splits * kRows + threadIdx.x;
    Extent all{-kInfinity, 0};
    for (int s = 0; s < number_splits; ++s) all.greatest = fmaxf(all.greatest, of_split[s * kRows].greatest);
    for (int s = 0; s < number_splits; ++s) {
      const Extent split = of_split[s * kRows];
      if (split.greatest > -kInfinity) all.sum += split.sum * expf(split.greatest - all.greatest);
      if (isnan(split.sum)) all.sum = split.sum;
    }
    whole[threadIdx.x] = all;
  }
  __syncthreads();
  multiply(tiles, p.size, tiles.logits, kKeys<T>);
  __syncthreads();
  float sum = 0;
  for (int r = part * (kRows / kParts); r < (part + 1) * (kRows / kParts); ++r) {
    if (!inside || rows.place[r] < 0) continue;
    float weight = 0;  // a column that is not seen stays zero, whatever the row's sum is
    if (origin + column >= 0 && origin + column <= rows.last[r]) {
      weight = expf(tiles.logits[r * kKeys<T> + column] * p.scale - whole[r].greatest) / whole[r].sum;
    }
    if (divisor != nullptr) {
      weight /= divisor[(static_cast<int64_t>(blockIdx.z) * p.rows + rows.place[r]) * p.visual + first + column];
    }
    sum += weight;
  }
  sums[part][column] = sum;
  __syncthreads();
  if (part != 0 || !inside) return;
  for (int other = 1; other < kParts; ++other) sum += sums[other][column];
  partial[column] = sum / static_cast<float>(rows.number);
}

// totals [batch, heads]: the sum of each head's columns.
__global__ void __launch_bounds__(kBlock) add_columns(ScoreProblem p, int tiles_of_rows, const float* partial,
                                                      float* totals) {
  const int64_t own = static_cast<int64_t>(blockIdx.y) * p.heads + blockIdx.x;
  partial += own * tiles_of_rows * p.visual;
  float sum = 0;
  for (int i = static_cast<int>(threadIdx.x); i < tiles_of_rows * p.visual; i += kBlock) sum += partial[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) totals[own] = ranked(sum);
}

// score [batch, visual]: the mean over all heads, or with `totals` over those with the greatest totals.
__global__ void __launch_bounds__(kBlock) mean_of_heads(ScoreProblem p, int tiles_of_rows, const float* partial,
                                                        const float* totals, float* score) {
  constexpr int kParts = kBlock / kColumns;
  __shared__ float sums[kParts][kColumns];
  const int64_t b = blockIdx.y;
  const int column = static_cast<int>(threadIdx.x) % kColumns, part = static_cast<int>(threadIdx.x) / kColumns;
  const int v = static_cast<int>(blockIdx.x) * kColumns + column;
  partial += b * p.heads * tiles_of_rows * p.visual;
  float sum = 0;
  for (int h = part; h < p.heads && v < p.visual; h += kParts) {
    if (totals != nullptr && rank_of(totals + b * p.heads, p.heads, h) >= p.best_heads) continue;
    for (int t = 0; t < tiles_of_rows; ++t) sum += partial[(static_cast<int64_t>(h) * tiles_of_rows + t) * p.visual + v];
  }
  sums[part][column] = sum;
  __syncthreads();
  if (part != 0 || v >= p.visual) return;
  for (int other = 1; other < kParts; ++other) sum += sums[other][column];
  score[b * p.visual + v] = sum / static_cast<float>(totals == nullptr ? p.heads : p.best_heads);
}

// The arrays in the workspace.
struct Workspace {
  Extent* extents;
  float *partial, *totals;
  size_t bytes;

  Workspace(const ScoreProblem& p, void* memory) {
    const size_t heads = static_cast<size_t>(p.batch) * p.heads, tiles = row_tiles(p);
    const size_t first = heads * tiles * splits(p) * kRows * sizeof(Extent), second = heads * tiles * p.visual * sizeof(float);
    char* place = static_cast<char*>(memory);
    extents = reinterpret_cast<Extent*>(place);
    partial = reinterpret_cast<float*>(place + first);
    totals = reinterpret_cast<float*>(place + first + second);
    bytes = first + second + heads * sizeof(float);
  }
};

}  // namespace

size_t workspace_size(const ScoreProblem& p) { return Workspace(p, nullptr).bytes; }

cudaError_t token_score(const ScoreProblem& p, const void* query, const void* key, const bool* counts,
                        const int64_t* places, const int64_t* start, const float* divisor, float* score,
                        void* workspace, cudaStream_t stream) {
  if (p.refusal() != nullptr) return cudaErrorInvalidValue;
  if (p.batch == 0) return cudaSuccess;
  const Workspace w(p, workspace);
  const int tiles = row_tiles(p), number_splits = splits(p);
  Launcher on(stream);
  for_type<__half, __nv_bfloat16>(p.type, [&](auto zero) {
    using T = decltype(zero);
    const int chunks = ceil_div(p.visual, kKeys<T>);
    on.run(measure<T>, dim3(tiles * number_splits, p.heads, p.batch), kThreads, shared_size<T>(p, kSplit), p, tiles, query,
           key, counts, places, w.extents);
    on.run(add_rows<T>, dim3(tiles * chunks, p.heads, p.batch), kThreads, shared_size<T>(p, kKeys<T>), p, tiles,
           number_splits, query, key, counts, places, start, divisor, w.extents, w.partial);
  });
  const float* totals = p.best_heads > 0 ? w.totals : nullptr;
  if (totals != nullptr) on.run(add_columns, dim3(p.heads, p.batch), kBlock, 0, p, tiles, w.partial, w.totals);
  on.run(mean_of_heads, dim3(ceil_div(p.visual, kColumns), p.batch), kBlock, 0, p, tiles, w.partial, totals, score);
  return on.error();
}

}  // namespace vtexport::cuda
