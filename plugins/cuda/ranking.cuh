// Ranks of scores, which TokenSelect and TokenRecycle both begin with.
#pragma once

#include <cstdint>

#include "cuda/launch.cuh"

namespace vtexport::cuda {

// rank [batch, tokens]: how many beat each of score [batch, tokens], by value or at equal value by a lower index.
void rank_all(Launcher& on, const float* score, int32_t batch, int32_t tokens, int32_t* rank);

}  // namespace vtexport::cuda
