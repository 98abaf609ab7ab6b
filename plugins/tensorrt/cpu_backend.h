// The CPU twins with the CUDA kernels' signatures, for the harness that drives the plugins without a GPU.
#pragma once

#include <cuda_runtime_api.h>

#include "cpu/kernels.h"

namespace vtexport::cpu_backend {

inline size_t workspace_size(const ScoreProblem&) { return 0; }
inline size_t workspace_size(const SelectProblem&) { return 0; }
inline size_t workspace_size(const RecycleProblem&) { return 0; }

inline cudaError_t token_score(const ScoreProblem& p, const void* query, const void* key, const int64_t* places,
                               const int64_t* start, const float* divisor, float* score, void*, cudaStream_t) {
  if (p.refusal() != nullptr) return cudaErrorInvalidValue;
  cpu::token_score(p, query, key, places, start, divisor, score);
  return cudaSuccess;
}

inline cudaError_t token_select(const SelectProblem& p, const void* hidden, const float* score, void* kept,
                                int32_t* index, int32_t* rank, void*, cudaStream_t) {
  if (p.refusal() != nullptr) return cudaErrorInvalidValue;
  cpu::token_select(p, hidden, score, kept, index, rank);
  return cudaSuccess;
}

inline cudaError_t token_recycle(const RecycleProblem& p, const void* hidden, const int32_t* rank, void* merged,
                                 int32_t* centres, int32_t* cluster, void*, cudaStream_t) {
  if (p.refusal() != nullptr) return cudaErrorInvalidValue;
  cpu::token_recycle(p, hidden, rank, merged, centres, cluster);
  return cudaSuccess;
}

}  // namespace vtexport::cpu_backend
