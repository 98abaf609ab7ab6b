// What a block of threads does together, always in the same order, so that two runs give the same bits.
#pragma once

#include <cstdint>

#include "cuda/number.cuh"

namespace vtexport::cuda {

constexpr int kBlock = 256;

// The sum of `value` over the block, in every thread; `scratch` holds kBlock floats. All threads must call it.
__device__ inline float block_sum(float value, float* scratch) {
  scratch[threadIdx.x] = value;
  __syncthreads();
  for (int half = kBlock / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) scratch[threadIdx.x] += scratch[threadIdx.x + half];
    __syncthreads();
  }
  const float sum = scratch[0];
  __syncthreads();
  return sum;
}

__device__ inline float block_min(float value, float* scratch) {
  scratch[threadIdx.x] = value;
  __syncthreads();
  for (int half = kBlock / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) scratch[threadIdx.x] = fminf(scratch[threadIdx.x], scratch[threadIdx.x + half]);
    __syncthreads();
  }
  const float least = scratch[0];
  __syncthreads();
  return least;
}

// How many of `values` beat number i: greater, or equal and before it. Values must be numbers.
__device__ inline int32_t rank_of(const float* values, int32_t total, int32_t i) {
  const float own = values[i];
  int32_t beaten = 0;
  for (int32_t j = 0; j < total; ++j) beaten += values[j] > own || (values[j] == own && j < i);
  return beaten;
}

// NaN ranks behind every number.
__device__ inline float ranked(float value) { return isnan(value) ? -kInfinity : value; }

// Lists, ascending, the places below `total` for which `wanted(place)` holds. `counts` holds kBlock + 1 ints; all threads
// must call it. Each thread looks at a run of neighbours, so that a prefix sum of the runs' counts orders all of them.
template <typename Wanted, typename Take>
__device__ void list_places(int32_t total, int32_t* counts, Wanted wanted, Take take) {
  const int32_t run = (total + kBlock - 1) / kBlock, first = threadIdx.x * run, end = min(first + run, total);
  int32_t mine = 0;
  for (int32_t i = first; i < end; ++i) mine += wanted(i);
  counts[threadIdx.x + 1] = mine;
  if (threadIdx.x == 0) counts[0] = 0;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int32_t t = 0; t < kBlock; ++t) counts[t + 1] += counts[t];
  }
  __syncthreads();
  int32_t number = counts[threadIdx.x];
  for (int32_t i = first; i < end; ++i) {
    if (wanted(i)) take(number++, i);
  }
  __syncthreads();
}

}  // namespace vtexport::cuda
