// The Python interface of the kernels, the same for both devices: DLPack arrays are checked, and their pointers are
// passed to a Runner. Outputs are written into arrays that the caller provides.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "vtexport/contract.h"

namespace vtexport::python {

namespace nb = nanobind;

inline void require(bool fits, const char* what) {
  if (!fits) throw std::invalid_argument(what);
}

inline int32_t extent(size_t size) {
  require(size <= INT32_MAX, "an extent exceeds int32");
  return static_cast<int32_t>(size);
}

// A Runner has `Device`, nb::device::cpu or nb::device::cuda, and a call operator for each problem and its pointers.
template <typename Runner>
class Ops {
 public:
  // Any of the three element types; checked by `type_of`.
  template <int Dimensions>
  using Elements = nb::ndarray<nb::ndim<Dimensions>, nb::c_contig, typename Runner::Device>;
  template <typename T, int Dimensions>
  using Array = nb::ndarray<T, nb::ndim<Dimensions>, nb::c_contig, typename Runner::Device>;

  template <typename... Arguments>
  static void define(nb::module_& module, const char* name) {
    using namespace nb::literals;
    nb::class_<Runner>(module, name)
        .def(nb::init<Arguments...>())
        .def("token_score", &token_score, "query"_a, "key"_a, "places"_a, "start"_a, "divisor"_a.none(), "score"_a, "scale"_a,
             "heads"_a)
        .def("token_select", &token_select, "hidden"_a, "score"_a, "kept"_a, "index"_a, "rank"_a)
        .def("token_recycle", &token_recycle, "hidden"_a, "rank"_a, "merged"_a, "centres"_a, "cluster"_a, "keep"_a,
             "pool"_a, "paper"_a);
  }

 private:
  template <typename A>
  static DType type_of(const A& array, const char* name) {
    const nb::dlpack::dtype type = array.dtype();
    if (type == nb::dtype<float>()) return DType::kFloat32;
    if (type.bits == 16 && type.lanes == 1) {
      if (type.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Float)) return DType::kFloat16;
      if (type.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat)) return DType::kBFloat16;
    }
    throw std::invalid_argument(std::string(name) + " must be float32, float16 or bfloat16");
  }

  static void token_score(Runner& run, const Elements<4>& query, const Elements<4>& key,
                          const Array<const int64_t, 2>& places, const Array<const int64_t, 1>& start,
                          const std::optional<Array<const float, 3>>& divisor, const Array<float, 2>& score, float scale,
                          int32_t heads) {
    const ScoreProblem problem{extent(query.shape(0)), extent(query.shape(1)), extent(key.shape(1)),
                               extent(query.shape(2)), extent(key.shape(2)),   extent(query.shape(3)),
                               extent(score.shape(1)), scale,                  heads,
                               type_of(query, "query")};
    require(problem.refusal() == nullptr, problem.refusal());
    require(type_of(key, "key") == problem.type, "query and key differ in dtype");
    require(key.shape(0) == query.shape(0) && key.shape(3) == query.shape(3), "query and key differ in shape");
    require(places.shape(0) == query.shape(0) && places.shape(1) == query.shape(2), "places must be [batch, rows]");
    require(start.shape(0) == query.shape(0) && score.shape(0) == query.shape(0), "start and score must be [batch, ...]");
    require((heads > 0) == divisor.has_value(), "heads and divisor go together");
    if (divisor) {
      require(divisor->shape(0) == places.shape(0) && divisor->shape(1) == places.shape(1) &&
                  divisor->shape(2) == score.shape(1),
              "divisor must be [batch, rows, count]");
    }
    run(problem, query.data(), key.data(), places.data(), start.data(), divisor ? divisor->data() : nullptr,
        score.data());
  }

  static void token_select(Runner& run, const Elements<3>& hidden, const Array<const float, 2>& score,
                           const Elements<3>& kept, const Array<int32_t, 2>& index, const Array<int32_t, 2>& rank) {
    const SelectProblem problem{extent(hidden.shape(0)), extent(hidden.shape(1)), extent(hidden.shape(2)),
                                extent(index.shape(1)), type_of(hidden, "hidden")};
    require(problem.refusal() == nullptr, problem.refusal());
    require(score.shape(0) == hidden.shape(0) && score.shape(1) == hidden.shape(1), "score must be [batch, tokens]");
    require(type_of(kept, "kept") == problem.type && kept.shape(0) == hidden.shape(0) &&
                kept.shape(1) == index.shape(1) && kept.shape(2) == hidden.shape(2) && index.shape(0) == hidden.shape(0),
            "kept must be [batch, keep, width] and index [batch, keep]");
    require(rank.shape(0) == hidden.shape(0) && rank.shape(1) == hidden.shape(1), "rank must be [batch, tokens]");
    run(problem, hidden.data(), score.data(), kept.data(), index.data(), rank.data());
  }

  static void token_recycle(Runner& run, const Elements<3>& hidden, const Array<const int32_t, 2>& rank,
                            const Elements<3>& merged, const Array<int32_t, 2>& centres,
                            const Array<int32_t, 2>& cluster, int32_t keep, int32_t pool, bool paper) {
    const RecycleProblem problem{extent(hidden.shape(0)),
                                 extent(hidden.shape(1)),
                                 extent(hidden.shape(2)),
                                 keep,
                                 pool,
                                 extent(centres.shape(1)),
                                 paper,
                                 type_of(hidden, "hidden")};
    require(problem.refusal() == nullptr, problem.refusal());
    require(rank.shape(0) == hidden.shape(0) && rank.shape(1) == hidden.shape(1), "rank must be [batch, tokens]");
    require(type_of(merged, "merged") == problem.type && merged.shape(0) == hidden.shape(0) &&
                merged.shape(1) == centres.shape(1) && merged.shape(2) == hidden.shape(2),
            "merged must be [batch, clusters, width]");
    require(centres.shape(0) == hidden.shape(0) && cluster.shape(0) == hidden.shape(0) &&
                cluster.shape(1) == hidden.shape(1),
            "centres must be [batch, clusters] and cluster [batch, tokens]");
    run(problem, hidden.data(), rank.data(), merged.data(), centres.data(), cluster.data());
  }
};

}  // namespace vtexport::python
