// Launches kernels and gives them dynamic shared memory. All kernels go through here, so that plugins/tests/emulator
// can replace this file by one of the same name and run them on a CPU, thread by thread.
#pragma once

#include <cuda_runtime.h>

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

// How a kernel is launched.
struct Launch {
  dim3 grid;
  unsigned block;
  size_t shared = 0;     // bytes of dynamic shared memory
  unsigned cluster = 1;  // blocks, along x, that reach each other's shared memory; needs code for sm_90 or later
  // Begin while the launch before it, of this Launcher, ends; the kernel calls wait_for_previous (tensor.cuh) before it
  // needs that one's results. Where the kernel's code knows no such wait, it begins when the other has ended.
  bool early = false;
};

// Launches on one stream; after an error, launches nothing more.
class Launcher {
 public:
  explicit Launcher(cudaStream_t stream) : stream_(stream) {}

  template <typename... Parameters, typename... Arguments>
  void run(void (*kernel)(Parameters...), dim3 grid, unsigned block, size_t shared, Arguments... arguments) {
    run(kernel, Launch{grid, block, shared}, arguments...);
  }

  template <typename... Parameters, typename... Arguments>
  void run(void (*kernel)(Parameters...), const Launch& launch, Arguments... arguments) {
    allow_shared(kernel, launch.shared);
    const bool early = launch.early && architecture(kernel) >= 90;
    if (error_ != cudaSuccess) return;
    cudaLaunchAttribute attributes[2];
    cudaLaunchConfig_t config = configuration(launch, attributes);
    if (early) {
      cudaLaunchAttribute& own = attributes[config.numAttrs++];
      own.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      own.val.programmaticStreamSerializationAllowed = 1;
    }
    error_ = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  }

  // What the current device runs of a kernel: the architecture, such as 90, that its code was compiled for, which may be
  // lower than the device's. All kernels are compiled for the same ones, so the first answer holds for all.
  template <typename... Parameters>
  int architecture(void (*kernel)(Parameters...)) {
    if (architecture_ == 0 && error_ == cudaSuccess) {
      cudaFuncAttributes attributes{};
      error_ = cudaFuncGetAttributes(&attributes, kernel);
      architecture_ = attributes.ptxVersion;
    }
    return architecture_;
  }

  // Bytes of shared memory that a block may have at most on the current device.
  size_t most_shared() {
    int device = 0, bytes = 0;
    if (error_ == cudaSuccess) error_ = cudaGetDevice(&device);
    if (error_ == cudaSuccess) error_ = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    return static_cast<size_t>(bytes);
  }

  // Whether the current device has room for one cluster of the launch. A part of a GPU may have fewer multiprocessors.
  template <typename... Parameters>
  bool has_room(void (*kernel)(Parameters...), const Launch& launch) {
    if (launch.cluster == 1) return true;
    int device = 0;
    if (error_ == cudaSuccess) error_ = cudaGetDevice(&device);
    allow_shared(kernel, launch.shared);
    if (error_ != cudaSuccess) return false;
    // The answer to a thread's last question is kept, because most ask for the same problem again and again.
    thread_local Question last{};
    const Question own{reinterpret_cast<const void*>(kernel), device, launch.cluster, launch.shared, false};
    if (last.kernel != own.kernel || last.device != own.device || last.cluster != own.cluster || last.shared != own.shared) {
      cudaLaunchAttribute attributes[2];
      const cudaLaunchConfig_t config = configuration(launch, attributes);
      int clusters = 0;
      // A device that refuses such a cluster has no room for one; nobody else should find that error.
      if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) != cudaSuccess) cudaGetLastError();
      last = own;
      last.room = clusters > 0;
    }
    return last.room;
  }

  cudaError_t error() const { return error_; }

 private:
  struct Question {
    const void* kernel;
    int device;
    unsigned cluster;
    size_t shared;
    bool room;  // the answer
  };

  // Beyond 48 KiB, static arrays included, a kernel must ask for its shared memory explicitly.
  template <typename... Parameters>
  void allow_shared(void (*kernel)(Parameters...), size_t shared) {
    if (error_ == cudaSuccess && shared > 40 * 1024) {
      error_ = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    }
  }

  cudaLaunchConfig_t configuration(const Launch& launch, cudaLaunchAttribute* attributes) const {
    cudaLaunchConfig_t config{};
    config.gridDim = launch.grid;
    config.blockDim = dim3(launch.block);
    config.dynamicSmemBytes = launch.shared;
    config.stream = stream_;
    config.attrs = attributes;
    if (launch.cluster > 1) {
      cudaLaunchAttribute& own = attributes[config.numAttrs++];
      own.id = cudaLaunchAttributeClusterDimension;
      own.val.clusterDim.x = launch.cluster;
      own.val.clusterDim.y = own.val.clusterDim.z = 1;
    }
    return config;
  }

  cudaStream_t stream_;
  int architecture_ = 0;
  cudaError_t error_ = cudaSuccess;
};

}  // namespace vtexport::cuda
