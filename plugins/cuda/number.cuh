// Elements of the three types on the device, read and written as float.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/launch.cuh"

namespace vtexport::cuda {

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

__device__ inline void store(float value, float& out) { out = value; }
__device__ inline void store(float value, __half& out) { out = __float2half_rn(value); }
__device__ inline void store(float value, __nv_bfloat16& out) { out = __float2bfloat16_rn(value); }

template <typename T>
__device__ inline T zero_of() {
  T value;
  store(0.0f, value);
  return value;
}

// Whether this GPU's tensor cores multiply T: fp16 from Turing on, bf16 from Ampere on. fp32 never runs on them here,
// because TF32 has too few digits to rank by.
template <typename T>
constexpr bool kTensorCores = false;
template <>
inline constexpr bool kTensorCores<__half> = true;
template <>
inline constexpr bool kTensorCores<__nv_bfloat16> = VTEXPORT_ARCHITECTURE >= 800;

constexpr float kInfinity = __builtin_huge_valf();

}  // namespace vtexport::cuda
