// vtexport._native: the CPU twins over DLPack arrays. exporter/vtexport/native.py is what Python code calls.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <nanobind/stl/optional.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using vtexport::DType;

// Any of the three element types; checked by `type_of`.
template <int Dimensions>
using Elements = nb::ndarray<nb::ndim<Dimensions>, nb::c_contig, nb::device::cpu>;
template <typename T, int Dimensions>
using Array = nb::ndarray<T, nb::ndim<Dimensions>, nb::c_contig, nb::device::cpu>;

template <typename A>
DType type_of(const A& array, const char* name) {
  const nb::dlpack::dtype type = array.dtype();
  if (type == nb::dtype<float>()) return DType::kFloat32;
  if (type.bits == 16 && type.lanes == 1) {
    if (type.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Float)) return DType::kFloat16;
    if (type.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat)) return DType::kBFloat16;
  }
  throw std::invalid_argument(std::string(name) + " must be float32, float16 or bfloat16");
}

void require(bool fits, const char* what) {
  if (!fits) throw std::invalid_argument(what);
}

void check(const char* refusal) {
  if (refusal != nullptr) throw std::invalid_argument(refusal);
}

int32_t extent(size_t size) {
  require(size <= INT32_MAX, "an extent exceeds int32");
  return static_cast<int32_t>(size);
}

void token_score(const Elements<4>& query, const Elements<4>& key, const Array<const bool, 2>& rows,
                 const Array<const int64_t, 2>& places, const Array<const int64_t, 1>& start,
                 const std::optional<Array<const float, 3>>& divisor, float scale, int32_t heads,
                 const Array<float, 2>& score) {
  const vtexport::ScoreProblem problem{extent(query.shape(0)), extent(query.shape(1)), extent(key.shape(1)),
                                       extent(query.shape(2)), extent(key.shape(2)),   extent(query.shape(3)),
                                       extent(score.shape(1)), scale,                  heads,
                                       type_of(query, "query")};
  check(problem.refusal());
  require(type_of(key, "key") == problem.type, "query and key differ in dtype");
  require(key.shape(0) == query.shape(0) && key.shape(3) == query.shape(3), "query and key differ in shape");
  const bool by_row = rows.shape(0) == query.shape(0) && rows.shape(1) == query.shape(2);
  require(by_row && places.shape(0) == rows.shape(0) && places.shape(1) == rows.shape(1),
          "rows and places must be [batch, rows]");
  require(start.shape(0) == query.shape(0) && score.shape(0) == query.shape(0), "start and score must be [batch, ...]");
  require((heads > 0) == divisor.has_value(), "heads and divisor go together");
  if (divisor) {
    require(divisor->shape(0) == rows.shape(0) && divisor->shape(1) == rows.shape(1) &&
                divisor->shape(2) == score.shape(1),
            "divisor must be [batch, rows, count]");
  }
  const float* weights = divisor ? divisor->data() : nullptr;
  nb::gil_scoped_release release;
  vtexport::cpu::token_score(problem, query.data(), key.data(), rows.data(), places.data(), start.data(), weights,
                             score.data());
}

void token_select(const Elements<3>& hidden, const Array<const float, 2>& score, const Elements<3>& kept,
                  const Array<int32_t, 2>& index) {
  const vtexport::SelectProblem problem{extent(hidden.shape(0)), extent(hidden.shape(1)), extent(hidden.shape(2)),
                                        extent(index.shape(1)), type_of(hidden, "hidden")};
  check(problem.refusal());
  require(score.shape(0) == hidden.shape(0) && score.shape(1) == hidden.shape(1), "score must be [batch, tokens]");
  require(type_of(kept, "kept") == problem.type && kept.shape(0) == hidden.shape(0) &&
              kept.shape(1) == index.shape(1) && kept.shape(2) == hidden.shape(2) && index.shape(0) == hidden.shape(0),
          "kept must be [batch, keep, width] and index [batch, keep]");
  nb::gil_scoped_release release;
  vtexport::cpu::token_select(problem, hidden.data(), score.data(), kept.data(), index.data());
}

void token_recycle(const Elements<3>& hidden, const Array<const float, 2>& score, int32_t keep, int32_t pool, bool paper,
                   const Elements<3>& merged, const Array<int32_t, 2>& centres, const Array<int32_t, 2>& cluster) {
  const vtexport::RecycleProblem problem{extent(hidden.shape(0)),
                                         extent(hidden.shape(1)),
                                         extent(hidden.shape(2)),
                                         keep,
                                         pool,
                                         extent(centres.shape(1)),
                                         paper,
                                         type_of(hidden, "hidden")};
  check(problem.refusal());
  require(score.shape(0) == hidden.shape(0) && score.shape(1) == hidden.shape(1), "score must be [batch, tokens]");
  require(type_of(merged, "merged") == problem.type && merged.shape(0) == hidden.shape(0) &&
              merged.shape(1) == centres.shape(1) && merged.shape(2) == hidden.shape(2),
          "merged must be [batch, clusters, width]");
  require(centres.shape(0) == hidden.shape(0) && cluster.shape(0) == hidden.shape(0) &&
              cluster.shape(1) == hidden.shape(1),
          "centres must be [batch, clusters] and cluster [batch, tokens]");
  nb::gil_scoped_release release;
  vtexport::cpu::token_recycle(problem, hidden.data(), score.data(), merged.data(), centres.data(), cluster.data());
}

}  // namespace

NB_MODULE(_native, module) {
  module.doc() = "The CPU twins of vtexport's kernels; outputs are written into arrays that the caller gives.";
  module.def("token_score", &token_score, "query"_a, "key"_a, "rows"_a, "places"_a, "start"_a,
             "divisor"_a.none(), "scale"_a, "heads"_a, "score"_a);
  module.def("token_select", &token_select, "hidden"_a, "score"_a, "kept"_a, "index"_a);
  module.def("token_recycle", &token_recycle, "hidden"_a, "score"_a, "keep"_a, "pool"_a, "paper"_a, "merged"_a,
             "centres"_a, "cluster"_a);
}
