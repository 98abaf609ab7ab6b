// TokenRecycle in seven launches: the pool, its distances, densities, peaks, centres, joining, merging. fp16 and
// bf16 distances come from products on tensor cores, d² = x·x + y·y - 2 x·y with all three products from the same
// tiles, so that equal tokens have a distance of exactly zero, as the tie rules require; fp32 adds up squared
// differences. The width is split over blocks by a rule that does not depend on the batch, and added up in a fixed
// order.
#include "cuda/block.cuh"
#include "cuda/kernels.h"

namespace vtexport::cuda {
namespace {

constexpr int kTile = 32;      // tokens per side
constexpr int kThreads = 128;  // for the distances: four warps with 16 x 16 products each
template <typename T>
constexpr int kDepth = sizeof(T) == 2 ? 128 : 64;  // elements of the width in shared memory at a time

// How the distances are divided: `pairs` tiles on and below the diagonal, `splits` runs of `run` depths of the width.
struct Cut {
  int pairs, splits, run;

  Cut(const RecycleProblem& p) {
    const int tiles = ceil_div(p.pool, kTile), depths = ceil_div(p.width, 64);
    pairs = tiles * (tiles + 1) / 2;
    const int wanted = ceil_div(256, pairs);  // about two blocks for each of an H200's 132 multiprocessors
    run = ceil_div(depths, wanted < depths ? wanted : depths);
    run += run % 2;  // a whole number of depths for either type
    splits = ceil_div(depths, run);
  }
};

// The arrays in the workspace, each for `batch` rows.
struct Workspace {
  float *partial, *squared;           // [splits, m, m], [m, m]
  float *density, *farthest, *peak;   // [m] each
  int32_t *pool, *centre, *joined;    // [m] places, -1 where place 0 stands in; [c] numbers in the pool; [m]
  size_t bytes = 0;

  Workspace(const RecycleProblem& p, void* memory) {
    char* place = static_cast<char*>(memory);
    auto take = [&](size_t elements) {
      char* own = place + bytes;
      bytes += (static_cast<size_t>(p.batch) * elements * 4 + 255) / 256 * 256;
      return own;
    };
    const size_t m = p.pool;
    partial = reinterpret_cast<float*>(take(Cut(p).splits * m * m));
    squared = reinterpret_cast<float*>(take(m * m));
    density = reinterpret_cast<float*>(take(m));
    farthest = reinterpret_cast<float*>(take(m));
    peak = reinterpret_cast<float*>(take(m));
    pool = reinterpret_cast<int32_t*>(take(m));
    centre = reinterpret_cast<int32_t*>(take(p.clusters));
    joined = reinterpret_cast<int32_t*>(take(m));
  }
};

__global__ void __launch_bounds__(kBlock) find_pool(RecycleProblem p, const int32_t* rank, int32_t* pool,
                                                    int32_t* cluster) {
  const int64_t b = blockIdx.x;
  rank += b * p.tokens;
  pool += b * p.pool;
  for (int i = static_cast<int>(threadIdx.x); i < p.tokens; i += kBlock) cluster[b * p.tokens + i] = -1;
  for (int i = static_cast<int>(threadIdx.x); i < p.pool; i += kBlock) pool[i] = -1;
  __syncthreads();
  list_places(
      p.tokens, [&](int32_t i) { return rank[i] >= p.keep && rank[i] < p.keep + p.pool; },
      [&](int32_t number, int32_t i) {
        if (number < p.pool) pool[number] = i;
      });
}

// A run of depths of kTile rows into shared memory; `rows` point to them in `hidden`, null beyond the pool's end.
template <typename T, int kStride>
__device__ void load(T (*tile)[kStride], const T* const* rows, int first, int width, bool vectors) {
  if constexpr (sizeof(T) == 2) {
    constexpr int kVector = 8, kPieces = kDepth<T> / kVector;
    for (int i = static_cast<int>(threadIdx.x); vectors && i < kTile * kPieces; i += kThreads) {
      const int row = i / kPieces, c = i % kPieces * kVector;
      uint4 piece = make_uint4(0, 0, 0, 0);
      if (rows[row] != nullptr && first + c < width) piece = *reinterpret_cast<const uint4*>(rows[row] + first + c);
      *reinterpret_cast<uint4*>(&tile[row][c]) = piece;
    }
    if (vectors) return;
  }
  for (int i = static_cast<int>(threadIdx.x); i < kTile * kDepth<T>; i += kThreads) {
    const int row = i / kDepth<T>, c = i % kDepth<T>;
    tile[row][c] = rows[row] != nullptr && first + c < width ? rows[row][first + c] : zero_of<T>();
  }
}

// partial [batch, splits, m, m], on and below the diagonal: x·y, or for fp32 the sum of squared differences.
template <typename T>
__global__ void __launch_bounds__(kThreads) measure(RecycleProblem p, int run, const T* hidden, const int32_t* pool,
                                                    float* partial) {
  constexpr int kStride = kDepth<T> + (sizeof(T) == 2 ? 8 : 1);  // neighbouring rows in different banks
  constexpr int kSide = 16;
  __shared__ __align__(128) T left[kTile][kStride], right[kTile][kStride];
  __shared__ __align__(128) float result[kTile][kTile];
  __shared__ const T* rows[2][kTile];
  // Pair number n is row y, column x of the triangle.
  int y = 0, x = static_cast<int>(blockIdx.x);
  while (x > y) x -= ++y;
  const int64_t b = blockIdx.z;
  if (threadIdx.x < 2 * kTile) {
    const int side = static_cast<int>(threadIdx.x) / kTile, number = static_cast<int>(threadIdx.x) % kTile;
    const int in_pool = (side == 0 ? y : x) * kTile + number;
    rows[side][number] =
        in_pool < p.pool ? hidden + (b * p.tokens + max(pool[b * p.pool + in_pool], 0)) * p.width : nullptr;
  }
  __syncthreads();
  const bool vectors = p.width % 8 == 0 && reinterpret_cast<uintptr_t>(hidden) % 16 == 0;
  const int begin = static_cast<int>(blockIdx.y) * run * 64, end = min(begin + run * 64, p.width);
  if constexpr (kTensorCores<T>) {
    using namespace nvcuda;
    const int row = warp_number() / 2 * kSide, column = warp_number() % 2 * kSide;
    wmma::fragment<wmma::accumulator, 16, 16, 16, float> sum;
    wmma::fill_fragment(sum, 0.0f);
    for (int first = begin; first < end; first += kDepth<T>) {
      load<T, kStride>(left, rows[0], first, p.width, vectors);
      load<T, kStride>(right, rows[1], first, p.width, vectors);
      __syncthreads();
      for (int d = 0; d < kDepth<T>; d += 16) {
        wmma::fragment<wmma::matrix_a, 16, 16, 16, T, wmma::row_major> a;
        wmma::fragment<wmma::matrix_b, 16, 16, 16, T, wmma::col_major> c;
        wmma::load_matrix_sync(a, &left[row][d], kStride);
        wmma::load_matrix_sync(c, &right[column][d], kStride);
        wmma::mma_sync(sum, a, c, sum);
      }
      __syncthreads();
    }
    wmma::store_matrix_sync(&result[row][column], sum, kTile, wmma::mem_row_major);
  } else {
    // A thread takes two rows and four columns.
    const int row = static_cast<int>(threadIdx.x) / 8, column = static_cast<int>(threadIdx.x) % 8;
    float sum[2][4] = {};
    for (int first = begin; first < end; first += kDepth<T>) {
      load<T, kStride>(left, rows[0], first, p.width, vectors);
      load<T, kStride>(right, rows[1], first, p.width, vectors);
      __syncthreads();
      for (int d = 0; d < kDepth<T>; ++d) {
        for (int i = 0; i < 2; ++i) {
          const float a = to_float(left[row + kSide * i][d]);
          for (int j = 0; j < 4; ++j) {
            const float c = to_float(right[column + 8 * j][d]);
            sum[i][j] += sizeof(T) == 4 ? (a - c) * (a - c) : a * c;
          }
        }
      }
      __syncthreads();
    }
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < 4; ++j) result[row + kSide * i][column + 8 * j] = sum[i][j];
    }
  }
  __syncthreads();
  partial += (b * gridDim.y + blockIdx.y) * p.pool * p.pool;
  for (int i = static_cast<int>(threadIdx.x); i < kTile * kTile; i += kThreads) {
    const int row = y * kTile + i / kTile, column = x * kTile + i % kTile;
    if (row < p.pool && column < p.pool) {
      partial[static_cast<int64_t>(row) * p.pool + column] = result[i / kTile][i % kTile];
    }
  }
}

// The sum over all splits for tokens i and j.
__device__ inline float add_splits(const float* partial, int splits, int m, int i, int j) {
  const int64_t place = static_cast<int64_t>(i > j ? i : j) * m + (i > j ? j : i), size = static_cast<int64_t>(m) * m;
  float sum = 0;
  for (int s = 0; s < splits; ++s) sum += partial[s * size + place];
  return sum;
}

// One block per token of the pool: its distances, minus the mean of the nearest, and the greatest.
__global__ void __launch_bounds__(kBlock) densities(RecycleProblem p, int splits, bool products, const float* partial,
                                                    float* squared, float* density, float* farthest) {
  float* row = reinterpret_cast<float*>(dynamic_shared());
  const int i = static_cast<int>(blockIdx.x);
  const int64_t b = blockIdx.y, own = b * p.pool + i;
  partial += b * splits * p.pool * p.pool;
  const float length = products ? add_splits(partial, splits, p.pool, i, i) : 0.0f;
  for (int j = static_cast<int>(threadIdx.x); j < p.pool; j += kBlock) {
    float distance = add_splits(partial, splits, p.pool, i, j);
    if (products) distance = length + add_splits(partial, splits, p.pool, j, j) - 2 * distance;
    distance = (distance < 0 ? 0.0f : distance) / static_cast<float>(p.width);
    // NaN counts as far from everything, because sorting needs an order.
    distance = i == j ? 0.0f : isnan(distance) ? kInfinity : distance;
    squared[own * p.pool + j] = distance;
    row[j] = -distance;
  }
  __syncthreads();
  float sum = 0, greatest = 0;
  for (int j = static_cast<int>(threadIdx.x); j < p.pool; j += kBlock) {
    if (rank_of(row, p.pool, j) < p.clusters) sum += row[j];
    greatest = fmaxf(greatest, -row[j]);
  }
  sum = block_sum(sum);
  greatest = block_max(greatest);
  if (threadIdx.x == 0) {
    density[own] = sum / static_cast<float>(p.clusters);
    farthest[own] = greatest;
  }
}

__global__ void __launch_bounds__(kBlock) peaks(RecycleProblem p, const float* squared, const float* density,
                                                const float* farthest, float* peak) {
  const int i = static_cast<int>(blockIdx.x);
  const int64_t first = static_cast<int64_t>(blockIdx.y) * p.pool;
  const float own = density[first + i];
  float greatest = 0, nearness = -kInfinity;
  for (int j = static_cast<int>(threadIdx.x); j < p.pool; j += kBlock) {
    greatest = fmaxf(greatest, farthest[first + j]);
    const float theirs = density[first + j];
    if (theirs > own || (theirs == own && j < i)) nearness = fmaxf(nearness, -squared[(first + i) * p.pool + j]);
  }
  greatest = block_max(greatest);
  nearness = block_max(nearness);
  // No token is denser: the greatest distance of all, which no other exceeds.
  const float delta = fminf(-nearness, greatest);
  if (threadIdx.x == 0) peak[first + i] = 0.5f * logf(delta) + own;
}

__global__ void __launch_bounds__(kBlock) find_centres(RecycleProblem p, const float* peak, const int32_t* pool,
                                                       int32_t* centre, int32_t* centres) {
  float* values = reinterpret_cast<float*>(dynamic_shared());
  const int64_t b = blockIdx.x;
  for (int i = static_cast<int>(threadIdx.x); i < p.pool; i += kBlock) values[i] = ranked(peak[b * p.pool + i]);
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < p.pool; i += kBlock) {
    const int32_t number = rank_of(values, p.pool, i);
    if (number >= p.clusters) continue;
    centre[b * p.clusters + number] = i;
    centres[b * p.clusters + number] = max(pool[b * p.pool + i], 0);
  }
}

// One warp per token of the pool: the nearest centre, of equally near ones the first; a centre joins itself.
template <typename T>
__global__ void __launch_bounds__(kBlock) join(RecycleProblem p, const T* hidden, const float* squared,
                                               const int32_t* pool, const int32_t* centre, int32_t* joined,
                                               int32_t* cluster) {
  const int i = static_cast<int>(blockIdx.x) * (kBlock / kWarp) + warp_number(), lane = lane_number();
  if (i >= p.pool) return;
  const int64_t b = blockIdx.y;
  pool += b * p.pool;
  centre += b * p.clusters;
  hidden += b * p.tokens * p.width;
  float nearest = -kInfinity;
  int32_t number = p.clusters;
  auto offer = [&](float near, int32_t k) {
    if (near > nearest || (near == nearest && k < number)) {
      nearest = near;
      number = k;
    }
  };
  if (p.paper) {
    // One centre after the other, with all lanes on its product.
    const T* own = hidden + static_cast<int64_t>(max(pool[i], 0)) * p.width;
    for (int32_t k = 0; k < p.clusters; ++k) {
      const T* theirs = hidden + static_cast<int64_t>(max(pool[centre[k]], 0)) * p.width;
      float product = 0, mine = 0, other = 0;
      for (int c = lane; c < p.width; c += kWarp) {
        const float x = to_float(own[c]), y = to_float(theirs[c]);
        product += x * y;
        mine += x * x;
        other += y * y;
      }
      const float lengths = fmaxf(sqrtf(warp_sum(mine)), 1e-12f) * fmaxf(sqrtf(warp_sum(other)), 1e-12f);
      offer(centre[k] == i ? kInfinity : ranked(warp_sum(product) / lengths), k);
    }
  } else {
    const float* row = squared + (b * p.pool + i) * p.pool;
    for (int32_t k = lane; k < p.clusters; k += kWarp) offer(centre[k] == i ? kInfinity : -row[centre[k]], k);
    for (int step = kWarp / 2; step > 0; step /= 2) {
      const float near = __shfl_xor_sync(kAllLanes, nearest, step);
      offer(near, __shfl_xor_sync(kAllLanes, number, step));
    }
  }
  if (lane == 0) {
    joined[b * p.pool + i] = number;
    if (pool[i] >= 0) cluster[b * p.tokens + pool[i]] = number;
  }
}

template <typename T>
__global__ void __launch_bounds__(kBlock) merge(RecycleProblem p, const T* hidden, const int32_t* pool,
                                                const int32_t* joined, T* merged) {
  int32_t* of = reinterpret_cast<int32_t*>(dynamic_shared());
  const int64_t b = blockIdx.z;
  for (int i = static_cast<int>(threadIdx.x); i < p.pool; i += kBlock) of[i] = joined[b * p.pool + i];
  __syncthreads();
  const int c = static_cast<int>(blockIdx.x) * kBlock + static_cast<int>(threadIdx.x), k = static_cast<int>(blockIdx.y);
  if (c >= p.width) return;
  float sum = 0;
  int32_t members = 0;
  for (int i = 0; i < p.pool; ++i) {
    if (of[i] != k) continue;
    sum += to_float(hidden[(b * p.tokens + max(pool[b * p.pool + i], 0)) * p.width + c]);
    ++members;
  }
  store(p.paper ? sum : sum / static_cast<float>(members), merged[(b * p.clusters + k) * p.width + c]);
}

template <typename T>
void run(Launcher& on, const RecycleProblem& p, const void* hidden, const int32_t* rank, void* merged, int32_t* centres,
         int32_t* cluster, void* memory) {
  const Workspace w(p, memory);
  const Cut cut(p);
  const T* rows = static_cast<const T*>(hidden);
  const unsigned m = static_cast<unsigned>(p.pool), batch = static_cast<unsigned>(p.batch);
  const size_t row = m * sizeof(float);
  on.run(find_pool, dim3(batch), kBlock, 0, p, rank, w.pool, cluster);
  on.run(measure<T>, dim3(cut.pairs, cut.splits, batch), kThreads, 0, p, cut.run, rows, w.pool, w.partial);
  on.run(densities, dim3(m, batch), kBlock, row, p, cut.splits, sizeof(T) == 2, w.partial, w.squared, w.density, w.farthest);
  on.run(peaks, dim3(m, batch), kBlock, 0, p, w.squared, w.density, w.farthest, w.peak);
  on.run(find_centres, dim3(batch), kBlock, row, p, w.peak, w.pool, w.centre, centres);
  on.run(join<T>, dim3(ceil_div(p.pool, kBlock / kWarp), batch), kBlock, 0, p, rows, w.squared, w.pool, w.centre, w.joined,
         cluster);
  on.run(merge<T>, dim3(ceil_div(p.width, kBlock), p.clusters, batch), kBlock, row, p, rows, w.pool, w.joined,
         static_cast<T*>(merged));
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
