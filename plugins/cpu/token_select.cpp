#include <algorithm>
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/ranking.h"

namespace vtexport::cpu {

void token_select(const SelectProblem& p, const void* hidden, const float* score, void* kept, int32_t* index,
                  int32_t* rank) {
  const size_t row = size_of(p.type) * p.width;  // rows are copied as bytes
  for (int32_t b = 0; b < p.batch; ++b) {
    auto chosen = order_of(score + static_cast<size_t>(b) * p.tokens, p.tokens);
    for (int32_t r = 0; r < p.tokens; ++r) rank[static_cast<size_t>(b) * p.tokens + chosen[r]] = r;
    std::sort(chosen.begin(), chosen.begin() + p.keep);
    for (int32_t k = 0; k < p.keep; ++k) {
      index[static_cast<size_t>(b) * p.keep + k] = chosen[k];
      std::memcpy(static_cast<char*>(kept) + (static_cast<size_t>(b) * p.keep + k) * row,
                  static_cast<const char*>(hidden) + (static_cast<size_t>(b) * p.tokens + chosen[k]) * row, row);
    }
  }
}

}  // namespace vtexport::cpu
