// The kernels of the op domain `vtexport` on a CUDA device; with the same contract as cpu/kernels.h. Pointers are to
// device memory. Nothing is allocated or synchronises; all launches are on `stream` and may be captured in a graph.
#pragma once

#include <cuda_runtime_api.h>

#include "vtexport/contract.h"

namespace vtexport::cuda {

// Bytes that the caller provides, aligned to 256; may be zero.
size_t workspace_size(const ScoreProblem& problem);
size_t workspace_size(const SelectProblem& problem);
size_t workspace_size(const RecycleProblem& problem);

cudaError_t token_score(const ScoreProblem& problem, const void* query, const void* key, const int64_t* places,
                        const int64_t* start, const float* divisor, float* score, void* workspace,
                        cudaStream_t stream);

cudaError_t token_select(const SelectProblem& problem, const void* hidden, const float* score, void* kept,
                         int32_t* index, int32_t* rank, void* workspace, cudaStream_t stream);

cudaError_t token_recycle(const RecycleProblem& problem, const void* hidden, const int32_t* rank, void* merged,
                          int32_t* centres, int32_t* cluster, void* workspace, cudaStream_t stream);

}  // namespace vtexport::cuda
