// The CPU twin of every kernel: plain loops in a fixed order, the yardstick for the CUDA kernels.
// Pointers are to dense row-major arrays as the contract lists them; a problem with a refusal must not be passed.
#pragma once

#include "vtexport/contract.h"

namespace vtexport::cpu {

void token_score(const ScoreProblem& problem, const void* query, const void* key, const int64_t* places,
                 const int64_t* start, const float* divisor, float* score);

void token_select(const SelectProblem& problem, const void* hidden, const float* score, void* kept, int32_t* index,
                  int32_t* rank);

void token_recycle(const RecycleProblem& problem, const void* hidden, const int32_t* rank, void* merged,
                   int32_t* centres, int32_t* cluster);

}  // namespace vtexport::cpu
