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
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return clean(a) > clean(b); });
  return order;
}

// The places of ranks `first` … `first + number - 1` among `total` values, ascending.
inline std::vector<int32_t> best(const float* values, int32_t total, int32_t first, int32_t number) {
  const auto order = order_of(values, total);
  std::vector<int32_t> found(order.begin() + first, order.begin() + first + number);
  std::sort(found.begin(), found.end());
  return found;
}

}  // namespace vtexport::cpu
