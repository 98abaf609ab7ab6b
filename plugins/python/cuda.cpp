// vtexport._cuda: the CUDA kernels. Python code calls exporter/vtexport/native/kernels.py.
#include <cuda_runtime_api.h>

#include "cuda/kernels.h"
#include "python/ops.h"

namespace {

namespace nb = nanobind;

// Runs on one stream of the current device; `allocate(bytes)` gives a workspace, an array of bytes on that device.
class OnStream {
 public:
  using Device = nb::device::cuda;

  OnStream(nb::callable allocate, uintptr_t stream)
      : allocate_(std::move(allocate)), stream_(reinterpret_cast<cudaStream_t>(stream)) {}

  template <typename... Pointers>
  void operator()(const vtexport::ScoreProblem& problem, Pointers... pointers) const {
    check(vtexport::cuda::token_score(problem, pointers..., workspace(problem), stream_));
  }
  template <typename... Pointers>
  void operator()(const vtexport::SelectProblem& problem, Pointers... pointers) const {
    check(vtexport::cuda::token_select(problem, pointers..., workspace(problem), stream_));
  }
  template <typename... Pointers>
  void operator()(const vtexport::RecycleProblem& problem, Pointers... pointers) const {
    check(vtexport::cuda::token_recycle(problem, pointers..., workspace(problem), stream_));
  }

 private:
  // Freed as soon as the caller drops it; the allocator orders that after the kernels on the same stream.
  template <typename Problem>
  void* workspace(const Problem& problem) const {
    using Bytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, Device>;
    return nb::cast<Bytes>(allocate_(vtexport::cuda::workspace_size(problem))).data();
  }

  static void check(cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
  }

  nb::callable allocate_;
  cudaStream_t stream_;
};

}  // namespace

NB_MODULE(_cuda, module) {
  module.doc() = "vtexport's CUDA kernels.";
  module.attr("ARCHITECTURES") = VTEXPORT_CUDA_ARCHITECTURES;
  module.attr("PTX") = VTEXPORT_CUDA_PTX;
  vtexport::python::Ops<OnStream>::define<nb::callable, uintptr_t>(module, "Kernels");
}
