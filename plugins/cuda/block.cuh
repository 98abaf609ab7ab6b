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

// The sum of `value` over a block of kThreads, in every thread. All threads must call it.
template <int kThreads = kBlock>
__device__ float block_sum(float value) {
  __shared__ float of_warp[kThreads / kWarp];
  value = warp_sum(value);
  if (lane_number() == 0) of_warp[warp_number()] = value;
  __syncthreads();
  float sum = 0;
  for (float part : of_warp) sum += part;
  __syncthreads();
  return sum;
}

template <int kThreads = kBlock>
__device__ float block_max(float value) {
  __shared__ float of_warp[kThreads / kWarp];
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

// Calls take(number, place) for the places below `total` for which wanted(place) holds, numbered in their order, and
// returns how many those are. All threads of a block of kThreads must call it. What any of them wrote before is there when
// `take` is called, and what `take` wrote is there afterwards.
template <int kThreads, typename Wanted, typename Take>
__device__ int32_t list_places(int32_t total, Wanted wanted, Take take) {
  constexpr int kWarps = kThreads / kWarp;
  __shared__ int32_t of_warp[kWarps];
  // Every warp has a run of places of its own, so that two barriers are enough.
  const int32_t run = ceil_div(ceil_div(total, kWarps), kWarp) * kWarp, begin = warp_number() * run;
  const int32_t end = min(begin + run, total);
  int32_t own = 0;
  for (int32_t base = begin; base < end; base += kWarp) {
    const int32_t place = base + lane_number();
    own += __popc(__ballot_sync(kAllLanes, place < end && wanted(place)));
  }
  if (lane_number() == 0) of_warp[warp_number()] = own;
  __syncthreads();
  int32_t number = 0, found = 0;
  for (int warp = 0; warp < kWarps; ++warp) {
    if (warp < warp_number()) number += of_warp[warp];
    found += of_warp[warp];
  }
  for (int32_t base = begin; base < end; base += kWarp) {
    const int32_t place = base + lane_number();
    const bool mine = place < end && wanted(place);
    const unsigned ballot = __ballot_sync(kAllLanes, mine);
    if (mine) take(number + __popc(ballot & ((1u << lane_number()) - 1u)), place);
    number += __popc(ballot);
  }
  __syncthreads();
  return found;
}

// A number's place in the order of numbers: of two keys, the greater is the greater number's. Values must be numbers.
__device__ inline uint32_t key_of(float value) {
  const uint32_t bits = __float_as_uint(value == 0 ? 0.0f : value);  // both zeros are equal
  return bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
}
__device__ inline float value_of(uint32_t key) {
  return __uint_as_float(key >> 31 != 0 ? key & 0x7FFFFFFFu : ~key);
}

// The number of one rank among many: its key, how many are greater, and how many are equal.
struct Boundary {
  uint32_t key;
  int32_t greater, equal;
};

// The number of rank `rank`, from 0 on, among keys key(i) of `total` numbers, found eight bits at a time by counting. All
// threads of a block of kThreads must call it; keys may be of what any of them wrote before.
template <int kThreads, typename Key>
__device__ Boundary find_rank(int32_t total, int32_t rank, Key key) {
  constexpr int kBins = 256, kPasses = 4, kEach = kBins / kWarp;
  __shared__ __align__(16) int32_t bins[kPasses][kBins];
  for (int i = static_cast<int>(threadIdx.x); i < kPasses * kBins; i += kThreads) bins[i / kBins][i % kBins] = 0;
  __syncthreads();
  Boundary found{0, 0, 0};
  for (int pass = 0; pass < kPasses; ++pass) {
    const int shift = 24 - 8 * pass;
    // The bits above are known.
    const uint32_t known = pass == 0 ? 0u : ~0u << (shift + 8);
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < total; i += kThreads) {
      const uint32_t own = key(i);
      if ((own & known) == found.key) atomicAdd(&bins[pass][own >> shift & (kBins - 1)], 1);
    }
    __syncthreads();
    // Every warp adds up all bins, from the last to the first: lane l has eight of them.
    const int4* mine = reinterpret_cast<const int4*>(&bins[pass][kBins - (lane_number() + 1) * kEach]);
    const int4 lower = mine[0], upper = mine[1];
    const int32_t own[kEach] = {upper.w, upper.z, upper.y, upper.x, lower.w, lower.z, lower.y, lower.x};
    int32_t sum = 0;
    for (int32_t count : own) sum += count;
    int32_t through = sum;
    for (int step = 1; step < kWarp; step *= 2) {
      const int32_t before = __shfl_up_sync(kAllLanes, through, step);
      if (lane_number() >= step) through += before;
    }
    // The lane whose bins have it, and the bin.
    const int lane = __ffs(static_cast<int>(__ballot_sync(kAllLanes, found.greater + through > rank))) - 1;
    int32_t greater = found.greater + through - sum, equal = own[kEach - 1];
    int bin = kEach - 1;
    bool passed = true;
#pragma unroll
    for (int e = 0; e + 1 < kEach; ++e) {
      const bool here = passed && greater + own[e] > rank;
      if (here) {
        bin = e;
        equal = own[e];
      }
      passed = passed && !here;
      if (passed) greater += own[e];
    }
    found.greater = __shfl_sync(kAllLanes, greater, lane);
    found.equal = __shfl_sync(kAllLanes, equal, lane);
    found.key |= static_cast<uint32_t>(kBins - 1 - lane * kEach - __shfl_sync(kAllLanes, bin, lane)) << shift;
  }
  __syncthreads();
  return found;
}

}  // namespace vtexport::cuda
