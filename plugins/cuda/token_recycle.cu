// TokenRecycle in seven launches: the pool, its distances (16 x 16 tiles), densities, peaks, centres, joining, merging.
// Distances are sums of squared differences in fp32: exact zeros for equal tokens, which the tie rules rest on.
#include "cuda/block.cuh"
#include "cuda/kernels.h"

namespace vtexport::cuda {
namespace {

constexpr int kTile = 16, kDepth = 64;

// What lies in the workspace, all of it for `batch` rows.
struct Workspace {
  float *squared, *density, *farthest, *peak;  // [m, m], [m], [m], [m]
  int32_t *pool, *centre, *joined;             // [m] places, [c] numbers in the pool, [m]
  size_t bytes;

  Workspace(const RecycleProblem& p, void* memory) {
    char* place = static_cast<char*>(memory);
    bytes = 0;
    auto take = [&](size_t elements) {
      char* own = place + bytes;
      bytes += (static_cast<size_t>(p.batch) * elements * 4 + 255) / 256 * 256;
      return own;
    };
    const size_t m = p.pool;
    squared = reinterpret_cast<float*>(take(m * m));
    density = reinterpret_cast<float*>(take(m));
    farthest = reinterpret_cast<float*>(take(m));
    peak = reinterpret_cast<float*>(take(m));
    pool = reinterpret_cast<int32_t*>(take(m));
    centre = reinterpret_cast<int32_t*>(take(p.clusters));
    joined = reinterpret_cast<int32_t*>(take(m));
  }
};

__global__ void __launch_bounds__(kBlock) find_pool(RecycleProblem p, const float* score, int32_t* pool,
                                                    int32_t* cluster) {
  extern __shared__ float values[];
  __shared__ int32_t counts[kBlock + 1];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * p.tokens;
  for (int i = threadIdx.x; i < p.tokens; i += kBlock) {
    values[i] = ranked(score[row + i]);
    cluster[row + i] = -1;
  }
  __syncthreads();
  int32_t* own = pool + static_cast<int64_t>(blockIdx.x) * p.pool;
  auto pooled = [&](int32_t i) {
    const int32_t rank = rank_of(values, p.tokens, i);
    return rank >= p.keep && rank < p.keep + p.pool;
  };
  list_places(p.tokens, counts, pooled, [&](int32_t number, int32_t i) { own[number] = i; });
}

template <typename T>
__global__ void __launch_bounds__(kTile* kTile)
    measure(RecycleProblem p, const T* hidden, const int32_t* pool, float* squared) {
  __shared__ float left[kTile][kDepth + 1], right[kTile][kDepth + 1];
  const int b = blockIdx.z, x = threadIdx.x % kTile, y = threadIdx.x / kTile;
  if (blockIdx.x > blockIdx.y) return;  // the matrix is symmetric: one half is computed, both are written
  const int i = blockIdx.y * kTile + y, j = blockIdx.x * kTile + x;
  __shared__ const T* rows[2 * kTile];
  if (threadIdx.x < 2 * kTile) {
    // Behind the pool's end the first row is read again; what comes of it is not written.
    const int number = (threadIdx.x < kTile ? blockIdx.y : blockIdx.x) * kTile + threadIdx.x % kTile;
    const int32_t place = pool[static_cast<int64_t>(b) * p.pool + (number < p.pool ? number : 0)];
    rows[threadIdx.x] = hidden + (static_cast<int64_t>(b) * p.tokens + place) * p.width;
  }
  __syncthreads();
  squared += static_cast<int64_t>(b) * p.pool * p.pool;
  float sum = 0;
  for (int first = 0; first < p.width; first += kDepth) {
    const int c = threadIdx.x % kDepth;
    for (int row = threadIdx.x / kDepth; row < kTile; row += kTile * kTile / kDepth) {
      const bool inside = first + c < p.width;
      left[row][c] = inside ? to_float(rows[row][first + c]) : 0.0f;
      right[row][c] = inside ? to_float(rows[kTile + row][first + c]) : 0.0f;
    }
    __syncthreads();
    for (int c = 0; c < kDepth; ++c) {
      const float difference = left[y][c] - right[x][c];
      sum += difference * difference;
    }
    __syncthreads();
  }
  if (i >= p.pool || j >= p.pool) return;
  // What is no number is far from everything: sorting needs an order.
  float distance = sum / static_cast<float>(p.width);
  distance = i == j ? 0.0f : isnan(distance) ? kInfinity : distance;
  squared[static_cast<int64_t>(i) * p.pool + j] = distance;
  squared[static_cast<int64_t>(j) * p.pool + i] = distance;
}

// A block a token of the pool: minus the mean of its nearest distances, and the greatest of all.
__global__ void __launch_bounds__(kBlock) densities(RecycleProblem p, const float* squared, float* density,
                                                    float* farthest) {
  extern __shared__ float row[];
  __shared__ float scratch[kBlock];
  const int64_t own = static_cast<int64_t>(blockIdx.y) * p.pool + blockIdx.x;
  for (int j = threadIdx.x; j < p.pool; j += kBlock) row[j] = -squared[own * p.pool + j];
  __syncthreads();
  float sum = 0, least = 0;
  for (int j = threadIdx.x; j < p.pool; j += kBlock) {
    if (rank_of(row, p.pool, j) < p.clusters) sum += row[j];
    least = fminf(least, row[j]);
  }
  sum = block_sum(sum, scratch);
  least = block_min(least, scratch);
  if (threadIdx.x == 0) {
    density[own] = sum / static_cast<float>(p.clusters);
    farthest[own] = -least;
  }
}

__global__ void __launch_bounds__(kBlock) peaks(RecycleProblem p, const float* squared, const float* density,
                                                const float* farthest, float* peak) {
  __shared__ float scratch[kBlock];
  const int i = blockIdx.x;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * p.pool;
  const float own = density[first + i];
  float greatest = 0, delta = kInfinity;
  bool any = false;
  for (int j = threadIdx.x; j < p.pool; j += kBlock) {
    greatest = fmaxf(greatest, farthest[first + j]);
    const float theirs = density[first + j];
    if (theirs > own || (theirs == own && j < i)) {
      delta = fminf(delta, squared[(first + i) * p.pool + j]);
      any = true;
    }
  }
  greatest = -block_min(-greatest, scratch);
  delta = block_min(any ? delta : greatest, scratch);
  if (threadIdx.x == 0) peak[first + i] = 0.5f * logf(delta) + own;
}

__global__ void __launch_bounds__(kBlock) find_centres(RecycleProblem p, const float* peak, const int32_t* pool,
                                                       int32_t* centre, int32_t* centres) {
  extern __shared__ float values[];
  __shared__ int32_t counts[kBlock + 1];
  const int64_t b = blockIdx.x;
  for (int i = threadIdx.x; i < p.pool; i += kBlock) values[i] = ranked(peak[b * p.pool + i]);
  __syncthreads();
  list_places(
      p.pool, counts, [&](int32_t i) { return rank_of(values, p.pool, i) < p.clusters; },
      [&](int32_t number, int32_t i) {
        centre[b * p.clusters + number] = i;
        centres[b * p.clusters + number] = pool[b * p.pool + i];
      });
}

// A block a token of the pool: the nearest centre, the lower number of equally near ones; a centre joins itself.
template <typename T>
__global__ void __launch_bounds__(kBlock) join(RecycleProblem p, const T* hidden, const float* squared,
                                               const int32_t* pool, const int32_t* centre, int32_t* joined,
                                               int32_t* cluster) {
  __shared__ float scratch[kBlock];
  const int i = blockIdx.x;
  const int64_t b = blockIdx.y;
  pool += b * p.pool;
  centre += b * p.clusters;
  hidden += b * p.tokens * p.width;
  const T* own = hidden + static_cast<int64_t>(pool[i]) * p.width;
  float length = 0;
  if (p.paper) {
    for (int c = threadIdx.x; c < p.width; c += kBlock) length += to_float(own[c]) * to_float(own[c]);
    length = fmaxf(sqrtf(block_sum(length, scratch)), 1e-12f);
  }
  float nearest = 0;
  int32_t number = 0;
  for (int k = 0; k < p.clusters; ++k) {
    if (centre[k] == i) {
      number = k;
      break;
    }
    float near = -squared[(b * p.pool + i) * p.pool + centre[k]];
    if (p.paper) {
      const T* theirs = hidden + static_cast<int64_t>(pool[centre[k]]) * p.width;
      float product = 0, square = 0;
      for (int c = threadIdx.x; c < p.width; c += kBlock) {
        product += to_float(own[c]) * to_float(theirs[c]);
        square += to_float(theirs[c]) * to_float(theirs[c]);
      }
      product = block_sum(product, scratch);
      near = product / (length * fmaxf(sqrtf(block_sum(square, scratch)), 1e-12f));
    }
    if (k == 0 || near > nearest) {
      nearest = near;
      number = k;
    }
  }
  if (threadIdx.x == 0) {
    joined[b * p.pool + i] = number;
    cluster[b * p.tokens + pool[i]] = number;
  }
}

template <typename T>
__global__ void __launch_bounds__(kBlock) merge(RecycleProblem p, const T* hidden, const int32_t* pool,
                                                const int32_t* joined, T* merged) {
  const int c = blockIdx.x * kBlock + threadIdx.x, k = blockIdx.y;
  const int64_t b = blockIdx.z;
  if (c >= p.width) return;
  float sum = 0;
  int32_t members = 0;
  for (int i = 0; i < p.pool; ++i) {
    if (joined[b * p.pool + i] != k) continue;
    sum += to_float(hidden[(b * p.tokens + pool[b * p.pool + i]) * p.width + c]);
    ++members;
  }
  store(p.paper ? sum : sum / static_cast<float>(members), merged[(b * p.clusters + k) * p.width + c]);
}

template <typename T>
cudaError_t run(const RecycleProblem& p, const void* hidden, const float* score, void* merged, int32_t* centres,
                int32_t* cluster, void* memory, cudaStream_t stream) {
  const Workspace w(p, memory);
  const T* rows = static_cast<const T*>(hidden);
  const int tiles = (p.pool + kTile - 1) / kTile;
  const size_t row = p.pool * sizeof(float);
  find_pool<<<p.batch, kBlock, p.tokens * sizeof(float), stream>>>(p, score, w.pool, cluster);
  measure<T><<<dim3(tiles, tiles, p.batch), kTile * kTile, 0, stream>>>(p, rows, w.pool, w.squared);
  densities<<<dim3(p.pool, p.batch), kBlock, row, stream>>>(p, w.squared, w.density, w.farthest);
  peaks<<<dim3(p.pool, p.batch), kBlock, 0, stream>>>(p, w.squared, w.density, w.farthest, w.peak);
  find_centres<<<p.batch, kBlock, row, stream>>>(p, w.peak, w.pool, w.centre, centres);
  join<T><<<dim3(p.pool, p.batch), kBlock, 0, stream>>>(p, rows, w.squared, w.pool, w.centre, w.joined, cluster);
  const dim3 grid((p.width + kBlock - 1) / kBlock, p.clusters, p.batch);
  merge<T><<<grid, kBlock, 0, stream>>>(p, rows, w.pool, w.joined, static_cast<T*>(merged));
  return cudaGetLastError();
}

}  // namespace

size_t workspace_size(const RecycleProblem& p) { return Workspace(p, nullptr).bytes; }

cudaError_t token_recycle(const RecycleProblem& p, const void* hidden, const float* score, void* merged,
                          int32_t* centres, int32_t* cluster, void* workspace, cudaStream_t stream) {
  if (p.refusal() != nullptr) return cudaErrorInvalidValue;
  if (p.batch == 0) return cudaSuccess;
  switch (p.type) {
    case DType::kFloat32:
      return run<float>(p, hidden, score, merged, centres, cluster, workspace, stream);
    case DType::kFloat16:
      return run<__half>(p, hidden, score, merged, centres, cluster, workspace, stream);
    case DType::kBFloat16:
      return run<__nv_bfloat16>(p, hidden, score, merged, centres, cluster, workspace, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace vtexport::cuda
