// Launches kernels and gives them dynamic shared memory. All kernels go through here, so that plugins/tests/emulator
// can replace this file by one of the same name and run them on a CPU, thread by thread.
#pragma once

#include <cuda_runtime.h>
#include <mma.h>

#include <cstddef>

#ifdef __CUDA_ARCH__
#define VTEXPORT_ARCHITECTURE __CUDA_ARCH__
#else
#define VTEXPORT_ARCHITECTURE 0  // the host's pass, for which no device code is compiled
#endif

namespace vtexport::cuda {

// The block's dynamic shared memory, aligned for tensor-core loads and for vectors.
__device__ inline unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

// Launches on one stream; after an error, launches nothing more.
class Launcher {
 public:
  explicit Launcher(cudaStream_t stream) : stream_(stream) {}

  template <typename... Parameters, typename... Arguments>
  void run(void (*kernel)(Parameters...), dim3 grid, unsigned block, size_t shared, Arguments... arguments) {
    // Beyond 48 KiB, static arrays included, a kernel must ask for its shared memory explicitly.
    if (error_ == cudaSuccess && shared > 40 * 1024) {
      error_ = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    }
    if (error_ != cudaSuccess) return;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(block);
    config.dynamicSmemBytes = shared;
    config.stream = stream_;
    error_ = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  }

  cudaError_t error() const { return error_; }

 private:
  cudaStream_t stream_;
  cudaError_t error_ = cudaSuccess;
};

}  // namespace vtexport::cuda
