// Elements of the three types on the device, read and written as float.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace vtexport::cuda {

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

__device__ inline void store(float value, float& out) { out = value; }
__device__ inline void store(float value, __half& out) { out = __float2half_rn(value); }
__device__ inline void store(float value, __nv_bfloat16& out) { out = __float2bfloat16_rn(value); }

constexpr float kInfinity = __builtin_huge_valf();

}  // namespace vtexport::cuda
