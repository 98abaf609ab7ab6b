// Operations of a whole warp or block, always in the same order, so that two runs give the same bits.
#pragma once

#include <cstdint>

#include "cuda/number.cuh"

namespace vtexport::cuda {

constexpr int kBlock = 256, kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

__device__ inline int lane_number() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ inline int warp_number() { return static_cast<int>(threadIdx.x) / kWarp; }

// The sum of `value` over the warp, in every lane.
template <typename T>
__device__ inline T warp_sum(T value) {
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

__device__ inline float warp_max(float value) {
  for (int step = kWarp / 2; step > 0; step /= 2) value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, step));
  return value;
}

// The sum of `value` over a block of kBlock threads, in every thread. All threads must call it.
__device__ inline float block_sum(float value) {
  __shared__ float of_warp[kBlock / kWarp];
  value = warp_sum(value);
  if (lane_number() == 0) of_warp[warp_number()] = value;
  __syncthreads();
  float sum = 0;
  for (float part : of_warp) sum += part;
  __syncthreads();
  return sum;
}

__device__ inline float block_max(float value) {
  __shared__ float of_warp[kBlock / kWarp];
  value = warp_max(value);
  if (lane_number() == 0) of_warp[warp_number()] = value;
  __syncthreads();
  float most = of_warp[0];
  for (float part : of_warp) most = fmaxf(most, part);
  __syncthreads();
  return most;
}

// NaN ranks after every number.
__device__ inline float ranked(float value) { return isnan(value) ? -kInfinity : value; }

// How many of `values` beat number i: greater, or equal and before it. Values must be numbers.
__device__ inline int32_t rank_of(const float* values, int32_t total, int32_t i) {
  const float own = values[i];
  int32_t beaten = 0;
  for (int32_t j = 0; j < total; ++j) beaten += values[j] > own || (values[j] == own && j < i);
  return beaten;
}

// Calls take(number, place) for the places below `total` for which wanted(place) holds, numbered in their order. All
// threads of a block of kBlock must call it.
template <typename Wanted, typename Take>
__device__ void list_places(int32_t total, Wanted wanted, Take take) {
  __shared__ int32_t of_warp[kBlock / kWarp];
  int32_t before = 0;
  for (int32_t base = 0; base < total; base += kBlock) {
    const int32_t place = base + static_cast<int32_t>(threadIdx.x);
    const bool mine = place < total && wanted(place);
    const unsigned ballot = __ballot_sync(kAllLanes, mine);
    if (lane_number() == 0) of_warp[warp_number()] = __popc(ballot);
    __syncthreads();
    int32_t number = before + __popc(ballot & ((1u << lane_number()) - 1u));
    for (int warp = 0; warp < kBlock / kWarp; ++warp) {
      if (warp < warp_number()) number += of_warp[warp];
      before += of_warp[warp];
    }
    if (mine) take(number, place);
    __syncthreads();
  }
}

}  // namespace vtexport::cuda
