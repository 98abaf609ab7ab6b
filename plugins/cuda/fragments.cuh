// How a warp holds matrices of 16-bit elements: lane l holds, of each 8 x 8 matrix, the elements 2 (l % 4) and
// 2 (l % 4) + 1 of row l / 4, in one register, the first in its lower half. A 16 x 16 tile is four such matrices:
//   x[0]: rows 0-7, elements 0-7    x[2]: rows 0-7, elements 8-15
//   x[1]: rows 8-15, elements 0-7   x[3]: rows 8-15, elements 8-15
// A 16 x 8 sum in fp32 is four registers: x[0] and x[1] are row l / 4, columns 2 (l % 4) and 2 (l % 4) + 1; x[2] and
// x[3] are the same columns of row l / 4 + 8.
#pragma once

#include <cstdint>

#include "cuda/launch.cuh"

namespace vtexport::cuda {

// What this GPU has.
constexpr bool kAsyncCopies = VTEXPORT_ARCHITECTURE >= 800;
constexpr bool kClusters = VTEXPORT_ARCHITECTURE >= 900;

struct Tile16 {
  uint32_t x[4];
};
struct Sum16x8 {
  float x[4];
};

}  // namespace vtexport::cuda
