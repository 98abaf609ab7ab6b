// Replaces plugins/cuda/launch.cuh and runs the kernels on a CPU, where there is no GPU. Threads of a block are fibers
// (fibers.h), and orders that a GPU leaves open are varied: that of threads between barriers, and that of blocks. Kernels
// that give the same bits in every order share no memory without a barrier. With VTEXPORT_EMULATE_WITH_THREADS they are
// threads of the operating system (threads.h), for ThreadSanitizer. A barrier that some threads never reach ends the
// program (or never opens), shared memory begins with random contents, launches that break CUDA's limits fail, and one
// that begins early must wait for the one before. The emulator says nothing about speed, alignment beyond what the CPU's
// sanitizers see, or the rounding of tensor cores.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#ifdef VTEXPORT_EMULATE_WITH_THREADS
#include "threads.h"
#else
#include "fibers.h"
#endif

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

#ifndef VTEXPORT_ARCHITECTURE
#define VTEXPORT_ARCHITECTURE 900
#endif

namespace vtexport::emulator {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

inline Order order = Order::kForward;
inline std::mt19937 generator(5);
inline int launches = 0;
inline Index block_index, grid_size;

struct ThreadIndex {
  struct X {
    operator unsigned() const { return block.thread(); }
  } x;
};
inline ThreadIndex thread_index;

// The blocks of a cluster are neighbours along x.
inline Index index_of_block() { return {block_index.x + block.rank(), block_index.y, block_index.z}; }

}  // namespace vtexport::emulator

#define threadIdx vtexport::emulator::thread_index
#define blockIdx vtexport::emulator::index_of_block()
#define gridDim vtexport::emulator::grid_size

inline void __syncthreads() { vtexport::emulator::block.wait(true); }
inline void __syncwarp() { vtexport::emulator::block.wait(false); }

inline unsigned __ballot_sync(unsigned, bool wanted) {
  auto& block = vtexport::emulator::block;
  block.say(wanted);
  block.meet();
  unsigned ballot = 0;
  const unsigned first = block.thread() / block.kWarp * block.kWarp;
  for (unsigned lane = 0; lane < block.kWarp; ++lane) ballot |= static_cast<unsigned>(block.heard<bool>(first + lane)) << lane;
  block.meet();
  return ballot;
}

// From the lane `from` gives for this lane; a lane outside the warp stands for this one.
template <typename T, typename From>
T shuffled(T value, From from) {
  auto& block = vtexport::emulator::block;
  const unsigned lane = block.thread() % block.kWarp, source = from(lane);
  block.say(value);
  block.meet();
  const T other = block.heard<T>(block.thread() - lane + (source < block.kWarp ? source : lane));
  block.meet();
  return other;
}
template <typename T>
T __shfl_up_sync(unsigned, T value, unsigned step) {
  return shuffled(value, [=](unsigned lane) { return lane - step; });
}
template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return shuffled(value, [=](unsigned) { return static_cast<unsigned>(lane) % 32; });
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return shuffled(value, [=](unsigned lane) { return lane ^ static_cast<unsigned>(mask); });
}

inline int atomicAdd(int* to, int value) { return __atomic_fetch_add(to, value, __ATOMIC_RELAXED); }

inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
using std::isnan;
template <typename T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
T max(T a, T b) {
  return a < b ? b : a;
}

namespace vtexport::cuda {

inline unsigned char* dynamic_shared() { return emulator::block.shared(); }

struct Launch {
  dim3 grid;
  unsigned block;
  size_t shared = 0;
  unsigned cluster = 1;
  bool early = false;  // a launch always begins when the one before has ended, which kernels must bear too
};

class Launcher {
 public:
  explicit Launcher(cudaStream_t) {}

  template <typename... Parameters, typename... Arguments>
  void run(void (*kernel)(Parameters...), dim3 grid, unsigned block, size_t shared, Arguments... arguments) {
    run(kernel, Launch{grid, block, shared}, arguments...);
  }

  template <typename... Parameters, typename... Arguments>
  void run(void (*kernel)(Parameters...), const Launch& launch, Arguments... arguments) {
    const dim3 grid = launch.grid;
    if (launch.block == 0 || launch.block > 1024 || launch.shared > most_shared() || grid.x == 0 || grid.y == 0 ||
        grid.z == 0 || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535 || launch.cluster > (VTEXPORT_ARCHITECTURE >= 900 ? 8 : 1) ||
        grid.x % launch.cluster != 0) {
      error_ = cudaErrorInvalidValue;
    }
    if (error_ != cudaSuccess) return;
    ++emulator::launches;
    const std::function<void()> body = [&] { kernel(static_cast<Parameters>(arguments)...); };
    emulator::grid_size = {grid.x, grid.y, grid.z};
    const unsigned clusters = grid.x / launch.cluster * grid.y * grid.z, along = grid.x / launch.cluster;
    std::vector<unsigned> turn(clusters);
    for (unsigned i = 0; i < clusters; ++i) turn[i] = emulator::order == emulator::Order::kBackward ? clusters - 1 - i : i;
    if (emulator::order == emulator::Order::kRandom) std::shuffle(turn.begin(), turn.end(), emulator::generator);
    for (unsigned i : turn) {
      emulator::block_index = {i % along * launch.cluster, i / along % grid.y, i / along / grid.y};
      emulator::block.run(launch.block, launch.cluster, launch.shared, emulator::order, emulator::generator, body);
      if (launch.early && emulator::block.waits() < launch.block * launch.cluster) {
        std::fprintf(stderr, "a thread of a launch that begins early never waits for the launch before\n");
        std::abort();
      }
    }
  }

  template <typename... Parameters>
  int architecture(void (*)(Parameters...)) const {
    return VTEXPORT_ARCHITECTURE / 10;
  }

  // The limit per block on the smallest GPU: Turing, or those of Ada and Blackwell that are no data-centre GPUs.
  size_t most_shared() const { return (VTEXPORT_ARCHITECTURE >= 800 ? 99 : 64) * 1024; }

  template <typename... Parameters>
  bool has_room(void (*)(Parameters...), const Launch& launch) const {
    return launch.cluster <= 8;
  }

  cudaError_t error() const { return error_; }

 private:
  cudaError_t error_ = cudaSuccess;
};

}  // namespace vtexport::cuda

// How many kernels were launched so far.
extern "C" __attribute__((visibility("default"), weak)) int vtexport_launches() { return vtexport::emulator::launches; }

// The harness chooses the order of threads and blocks.
extern "C" __attribute__((visibility("default"), weak)) void vtexport_emulate(int order) {
  vtexport::emulator::order = static_cast<vtexport::emulator::Order>(order);
}
