// TokenScore: a block takes one head and sixteen rows that count. It walks the keys twice: once for each row's greatest
// logit and sum (online softmax), once over the visual columns alone, whose weights it adds up over its rows. Attention is
// never written. Sums over blocks are taken by a second kernel in a fixed order. fp16 and bf16 products run on tensor
// cores with fp32 accumulation; fp32 stays fp32, for its scores must rank as every other runtime's.
#include <mma.h>

#include "cuda/block.cuh"
#include "cuda/kernels.h"
#include "cuda/number.cuh"

namespace vtexport::cuda {
namespace {

constexpr int kRows = 16;   // rows a block
constexpr int kKeys = 64;   // keys a step: sixteen for each of four warps
constexpr int kThreads = 128;

// Rows of fp16 and bf16 tiles are padded by 16 bytes, so that neighbouring rows lie in different banks.
__host__ __device__ constexpr int padded(int size) { return (size + 15) / 16 * 16 + 8; }

int row_tiles(const ScoreProblem& p) { return (p.rows + kRows - 1) / kRows; }

template <typename T>
size_t shared_size(const ScoreProblem& p) {
  return static_cast<size_t>(kRows + kKeys) * padded(p.size) * sizeof(T);
}

// logits[16][64] = query tile · key tileᵀ, for two-byte types by tensor cores.
template <typename T>
struct Product {
  __device__ static void run(const T* query, const T* key, int stride, int size, float (*logits)[kKeys]) {
    using namespace nvcuda;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    constexpr bool has_type = sizeof(T) == 2 && !__is_same(T, __nv_bfloat16);
#else
    constexpr bool has_type = true;
#endif
    if constexpr (has_type) {
      const int first = (threadIdx.x / 32) * 16;
      wmma::fragment<wmma::accumulator, 16, 16, 16, float> sum;
      wmma::fill_fragment(sum, 0.0f);
      for (int d = 0; d < size; d += 16) {
        wmma::fragment<wmma::matrix_a, 16, 16, 16, T, wmma::row_major> a;
        wmma::fragment<wmma::matrix_b, 16, 16, 16, T, wmma::col_major> b;
        wmma::load_matrix_sync(a, query + d, stride);
        wmma::load_matrix_sync(b, key + first * stride + d, stride);
        wmma::mma_sync(sum, a, b, sum);
      }
      wmma::store_matrix_sync(&logits[0][first], sum, kKeys, wmma::mem_row_major);
    } else {
      plain(query, key, stride, size, logits);
    }
  }

  __device__ static void plain(const T* query, const T* key, int stride, int size, float (*logits)[kKeys]) {
    for (int i = threadIdx.x; i < kRows * kKeys; i += kThreads) {
      const int row = i / kKeys, column = i % kKeys;
      float sum = 0;
      for (int d = 0; d < size; ++d) sum += to_float(query[row * stride + d]) * to_float(key[column * stride + d]);
      logits[row][column] = sum;
    }
  }
};

template <>
struct Product<float> {
  __device__ static void run(const float* query, const float* key, int stride, int size, float (*logits)[kKeys]) {
    for (int i = threadIdx.x; i < kRows * kKeys; i += kThreads) {
      const int row = i / kKeys, column = i % kKeys;
      float sum = 0;
      for (int d = 0; d < size; ++d) sum += query[row * stride + d] * key[column * stride + d];
      logits[row][column] = sum;
    }
  }
};

// Rows `first` … of a [total, size] array into a padded tile of `count` rows, zeros where there is none.
template <typename T>
__device__ void load_tile(T* tile, int count, int stride, const T* from, const int32_t* rows, int first, int total,
                          int size) {
  const int wide = (size + 15) / 16 * 16;
  for (int i = threadIdx.x; i < count * wide; i += kThreads) {
    const int row = i / wide, d = i % wide;
    const int source = rows != nullptr ? rows[row] : (first + row < total ? first + row : -1);
    T value;
    store(0.0f, value);
    if (source >= 0 && d < size) value = from[static_cast<int64_t>(source) * size + d];
    tile[row * stride + d] = value;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 6) attend(ScoreProblem p, const T* query, const T* key, const bool* counts,
                                                   const int64_t* places, const int64_t* start, const float* divisor,
                                                   float* partial) {
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ float logits[kRows][kKeys];
  __shared__ float greatest[kRows], total[kRows];
  __shared__ int32_t rows[kRows], last[kRows];
  __shared__ int32_t number;
  const int tile = blockIdx.x, h = blockIdx.y, b = blockIdx.z;
  const int stride = padded(p.size);
  T* queries = reinterpret_cast<T*>(memory);
  T* keys = queries + kRows * stride;
  counts += static_cast<int64_t>(b) * p.rows;
  places += static_cast<int64_t>(b) * p.rows;

  // The rows that count, sixteen of them from number 16 * tile on: found by one warp, in order.
  if (threadIdx.x < 32) {
    if (threadIdx.x < kRows) {
      rows[threadIdx.x] = -1;
      last[threadIdx.x] = -1;
    }
    __syncwarp();
    int32_t seen = 0;
    for (int base = 0; base < p.rows; base += 32) {
      const int r = base + static_cast<int>(threadIdx.x);
      const bool wanted = r < p.rows && counts[r];
      const unsigned ballot = __ballot_sync(0xFFFFFFFFu, wanted);
      const int32_t own = seen + __popc(ballot & ((1u << threadIdx.x) - 1u)) - tile * kRows;
      if (wanted && own >= 0 && own < kRows) {
        rows[own] = r;
        last[own] = static_cast<int32_t>(min(places[r], static_cast<int64_t>(p.keys - 1)));
      }
      seen += __popc(ballot);
    }
    if (threadIdx.x == 0) number = seen;
  }
  __syncthreads();
  float* out = partial + ((static_cast<int64_t>(b) * p.heads + h) * gridDim.x + tile) * p.visual;
  if (number <= tile * kRows) {
    for (int v = threadIdx.x; v < p.visual; v += kThreads) out[v] = 0;
    return;
  }
  const T* own_query = query + (static_cast<int64_t>(b) * p.heads + h) * p.rows * p.size;
  const int group = h / (p.heads / p.kv_heads);
  const T* own_key = key + (static_cast<int64_t>(b) * p.kv_heads + group) * p.keys * p.size;
  load_tile(queries, kRows, stride, own_query, rows, 0, p.rows, p.size);
  if (threadIdx.x < kRows) {
    greatest[threadIdx.x] = -kInfinity;
    total[threadIdx.x] = 0;
  }
  int32_t end = 0;
  for (int r = 0; r < kRows; ++r) end = max(end, last[r] + 1);

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int first = 0; first < end; first += kKeys) {
    load_tile<T>(keys, kKeys, stride, own_key, nullptr, first, p.keys, p.size);
    __syncthreads();
    Product<T>::run(queries, keys, stride, p.size, logits);
    __syncthreads();
    for (int r = warp * 4; r < warp * 4 + 4; ++r) {
      const int a = first + lane, c = a + 32;
      const float x = a <= last[r] ? logits[r][lane] * p.scale : -kInfinity;
      const float y = c <= last[r] ? logits[r][lane + 32] * p.scale : -kInfinity;
      float most = fmaxf(x, y);
      for (int step = 16; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFFu, most, step));
      const float before = greatest[r], now = fmaxf(before, most);
      // A key that is not seen adds nothing; one that is, even -inf or NaN, adds what exp makes of it.
      float sum = (a <= last[r] && now > -kInfinity ? expf(x - now) : 0.0f);
      sum += (c <= last[r] && now > -kInfinity ? expf(y - now) : 0.0f);
      if (isnan(x) || isnan(y)) sum = x + y;
      for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
      __syncwarp();
      if (lane == 0) {
        const float scaled = before > -kInfinity ? total[r] * expf(before - now) : total[r];
        total[r] = scaled + sum;
        greatest[r] = now;
      }
      __syncwarp();
    }
    __syncthreads();
  }

  const float share = 1.0f / static_cast<float>(number);
  const int64_t origin = start[b];
  for (int v = 0; v < p.visual; v += kKeys) {
    load_tile<T>(keys, kKeys, stride, own_key, nullptr, static_cast<int>(origin) + v, p.keys, p.size);
    __syncthreads();
    Product<T>::run(queries, keys, stride, p.size, logits);
    __syncthreads();
    const int column = v + static_cast<int>(threadIdx.x);
    if (threadIdx.x < kKeys && column < p.visual) {
      float sum = 0;
      for (int r = 0; r < kRows; ++r) {
        if (rows[r] < 0) continue;
        float weight = 0;  // a column that is not seen stays zero, whatever the row's sum is
        if (origin + column <= last[r]) weight = expf(logits[r][threadIdx.x] * p.scale - greatest[r]) / total[r];
        if (divisor != nullptr) {
          weight /= divisor[(static_cast<int64_t>(b) * p.rows + rows[r]) * p.visual + column];
        }
        sum += weight * share;
      }
      out[column] = sum;
    }
    __syncthreads();
  }
}

// partial [batch, heads, tiles, visual] -> score [batch, visual], the mean of all heads.
__global__ void mean_of_heads(ScoreProblem p, int tiles, const float* partial, float* score) {
  const int v = blockIdx.x * kBlock + threadIdx.x, b = blockIdx.y;
  if (v >= p.visual) return;
  float sum = 0;
  for (int h = 0; h < p.heads; ++h) {
    for (int t = 0; t < tiles; ++t) {
      sum += partial[((static_cast<int64_t>(b) * p.heads + h) * tiles + t) * p.visual + v];
    }
  }
  score[static_cast<int64_t>(b) * p.visual + v] = sum / static_cast<float>(p.heads);
}

// The same over the heads whose sum is greatest.
__global__ void mean_of_best_heads(ScoreProblem p, int tiles, const float* partial, float* score) {
  extern __shared__ float totals[];
  __shared__ float scratch[kBlock];
  const int b = blockIdx.x;
  const float* own = partial + static_cast<int64_t>(b) * p.heads * tiles * p.visual;
  for (int h = 0; h < p.heads; ++h) {
    float sum = 0;
    for (int v = threadIdx.x; v < p.visual; v += kBlock) {
      for (int t = 0; t < tiles; ++t) sum += own[(static_cast<int64_t>(h) * tiles + t) * p.visual + v];
    }
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) totals[h] = ranked(sum);
    __syncthreads();
  }
  for (int v = threadIdx.x; v < p.visual; v += kBlock) {
    float sum = 0;
    for (int h = 0; h < p.heads; ++h) {
      if (rank_of(totals, p.heads, h) >= p.best_heads) continue;
      for (int t = 0; t < tiles; ++t) sum += own[(static_cast<int64_t>(h) * tiles + t) * p.visual + v];
    }
    score[static_cast<int64_t>(b) * p.visual + v] = sum / static_cast<float>(p.best_heads);
  }
}

template <typename T>
cudaError_t run(const ScoreProblem& p, const void* query, const void* key, const bool* counts, const int64_t* places,
                const int64_t* start, const float* divisor, float* score, float* partial, cudaStream_t stream) {
  const size_t shared = shared_size<T>(p);
  if (shared > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(attend<T>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(shared));
    if (error != cudaSuccess) return error;
  }
  const int tiles = row_tiles(p);
  const dim3 grid(tiles, p.heads, p.batch);
  attend<T><<<grid, kThreads, shared, stream>>>(p, static_cast<const T*>(query), static_cast<const T*>(key), counts,
                                                 places, start, divisor, partial);
  if (p.best_heads > 0) {
    mean_of_best_heads<<<p.batch, kBlock, p.heads * sizeof(float), stream>>>(p, tiles, partial, score);
  } else {
    const dim3 blocks((p.visual + kBlock - 1) / kBlock, p.batch);
    mean_of_heads<<<blocks, kBlock, 0, stream>>>(p, tiles, partial, score);
  }
  return cudaGetLastError();
}

}  // namespace

size_t workspace_size(const ScoreProblem& p) {
  return static_cast<size_t>(p.batch) * p.heads * row_tiles(p) * p.visual * sizeof(float);
}

cudaError_t token_score(const ScoreProblem& p, const void* query, const void* key, const bool* counts,
                        const int64_t* places, const int64_t* start, const float* divisor, float* score,
                        void* workspace, cudaStream_t stream) {
  if (p.refusal() != nullptr) return cudaErrorInvalidValue;
  if (p.batch == 0) return cudaSuccess;
  float* partial = static_cast<float*>(workspace);
  switch (p.type) {
    case DType::kFloat32:
      return run<float>(p, query, key, counts, places, start, divisor, score, partial, stream);
    case DType::kFloat16:
      return run<__half>(p, query, key, counts, places, start, divisor, score, partial, stream);
    case DType::kBFloat16:
      return run<__nv_bfloat16>(p, query, key, counts, places, start, divisor, score, partial, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace vtexport::cuda
