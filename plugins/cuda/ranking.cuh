// Ranks of scores, the first step of both TokenSelect and TokenRecycle.
#pragma once

#include <cstdint>

#include "cuda/launch.cuh"

namespace vtexport::cuda {

// rank [batch, tokens]: how many scores beat each of score [batch, tokens]: greater ones and equal ones of lower index.
void rank_all(Launcher& on, const float* score, int32_t batch, int32_t tokens, int32_t* rank);

}  // namespace vtexport::cuda
