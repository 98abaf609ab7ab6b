// Order by value, the greatest first, and equal values by place; NaN comes after every number.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

namespace vtexport::cpu {

// The places of `total` values in that order.
inline std::vector<int32_t> order_of(const float* values, int32_t total) {
  auto clean = [values](int32_t place) {
    return std::isnan(values[place]) ? -std::numeric_limits<float>::infinity() : values[place];
  };
  std::vector<int32_t> order(total);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    const float first = clean(a), second = clean(b);
    return first > second || (first == second && a < b);
  });
  return order;
}

// The places of the first `number` of `total` values in that order, ascending.
inline std::vector<int32_t> best(const float* values, int32_t total, int32_t number) {
  auto found = order_of(values, total);
  found.resize(number);
  std::sort(found.begin(), found.end());
  return found;
}

}  // namespace vtexport::cpu
