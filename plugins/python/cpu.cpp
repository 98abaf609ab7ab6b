// vtexport._native: the CPU twins. Python code calls exporter/vtexport/native/kernels.py.
#include "cpu/kernels.h"
#include "python/ops.h"

namespace {

namespace nb = nanobind;

struct Twins {
  using Device = nb::device::cpu;

  template <typename... Pointers>
  void operator()(const vtexport::ScoreProblem& problem, Pointers... pointers) const {
    nb::gil_scoped_release release;
    vtexport::cpu::token_score(problem, pointers...);
  }
  template <typename... Pointers>
  void operator()(const vtexport::SelectProblem& problem, Pointers... pointers) const {
    nb::gil_scoped_release release;
    vtexport::cpu::token_select(problem, pointers...);
  }
  template <typename... Pointers>
  void operator()(const vtexport::RecycleProblem& problem, Pointers... pointers) const {
    nb::gil_scoped_release release;
    vtexport::cpu::token_recycle(problem, pointers...);
  }
};

}  // namespace

NB_MODULE(_native, module) {
  module.doc() = "The CPU twins of vtexport's kernels.";
  vtexport::python::Ops<Twins>::define<>(module, "Kernels");
}
