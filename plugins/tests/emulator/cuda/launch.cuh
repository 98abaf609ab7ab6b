// Replaces plugins/cuda/launch.cuh and runs the kernels on a CPU, where there is no GPU: every thread of a block is a
// fiber that runs to its next barrier. Orders that a GPU leaves open are varied: that of threads between barriers, and
// that of blocks. Kernels that give the same bits in every order share no memory without a barrier. A barrier that some
// threads never reach ends the program, and dynamic shared memory begins with random contents. The emulator says
// nothing about speed, alignment beyond what the CPU's sanitizers see, or the rounding of tensor cores.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

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

enum class Order { kForward, kBackward, kRandom };

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

// One block at a time, or the blocks of one cluster together: their threads, and their barriers. The threads of a
// cluster are numbered block by block. Static shared memory is one for all of them, so that the kernels of clusters
// must have none.
class Block {
 public:
  static constexpr unsigned kWarp = 32;

  void run(unsigned threads_each, unsigned blocks, size_t shared, Order order, std::mt19937& generator,
           const std::function<void()>& body) {
    const unsigned threads = threads_each * blocks;
    body_ = &body;
    each_ = threads_each;
    arrived_ = phase_ = 0;
    arrivals_.assign(threads, 0);
    shared_size_ = (shared + 127) / 128 * 128;
    shared_.reset(new (std::align_val_t(128)) unsigned char[shared_size_ * blocks + 1]);
    for (size_t i = 0; i < shared_size_ * blocks; i += sizeof(uint32_t)) {
      const uint32_t word = static_cast<uint32_t>(generator());
      std::memcpy(&shared_[i], &word, sizeof word);
    }
    fibers_.resize(threads);
    if (stacks_.size() < threads) stacks_.resize(threads);
    votes_.assign(threads, 0);
    for (unsigned t = 0; t < threads; ++t) {
      if (!stacks_[t]) stacks_[t] = std::make_unique<char[]>(kStack);
      Fiber& fiber = fibers_[t];
      fiber.state = State::kReady;
      fiber.begun = false;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = stacks_[t].get();
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, &Block::enter, 0);
    }
    // Forward, all warps advance together; backward, each runs as far as it can alone; at random, either.
    std::vector<unsigned> warps((threads + kWarp - 1) / kWarp), lanes(kWarp);
    for (unsigned w = 0; w < warps.size(); ++w) warps[w] = order == Order::kBackward ? warps.size() - 1 - w : w;
    for (unsigned l = 0; l < kWarp; ++l) lanes[l] = order == Order::kBackward ? kWarp - 1 - l : l;
    do {
      if (order == Order::kRandom) std::shuffle(warps.begin(), warps.end(), generator);
      for (unsigned w : warps) {
        do {
          if (order == Order::kRandom) std::shuffle(lanes.begin(), lanes.end(), generator);
          for (unsigned l : lanes) {
            const unsigned t = w * kWarp + l;
            if (t >= threads || fibers_[t].state != State::kReady) continue;
            current_ = t;
            resume(fibers_[t]);
          }
        } while (order != Order::kForward && (order == Order::kBackward || generator() % 2 == 0) && release_warp(w));
      }
    } while (release());
  }

  unsigned thread() const { return current_ % each_; }
  unsigned rank() const { return current_ / each_; }
  // A number that no other thread of the cluster has.
  unsigned thread_of_cluster() const { return current_; }
  unsigned char* shared() { return shared_.get() + rank() * shared_size_; }
  // Where block `rank` of the cluster has what this one has at `own`.
  const void* shared_of(unsigned rank, const void* own) const {
    return static_cast<const unsigned char*>(own) + (static_cast<ptrdiff_t>(rank) - this->rank()) * shared_size_;
  }

  // The two halves of the cluster's barrier.
  void arrive() {
    arrivals_[current_] = phase_;
    if (++arrived_ < fibers_.size()) return;
    arrived_ = 0;
    ++phase_;
    for (Fiber& fiber : fibers_) {
      if (fiber.state == State::kAtCluster) fiber.state = State::kReady;
    }
  }
  void wait_for_cluster() {
    if (phase_ == arrivals_[current_]) stop(State::kAtCluster);
  }

  void wait(bool whole_block) { stop(whole_block ? State::kAtBlock : State::kAtWarp); }

  // The word of every thread, as the warp or the block exchanges it.
  template <typename T>
  void say(T value) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    votes_[current_] = bits;
  }
  template <typename T>
  T heard(unsigned thread) const {
    T value;
    std::memcpy(&value, &votes_[rank() * each_ + thread], sizeof value);
    return value;
  }
  unsigned threads() const { return each_; }

 private:
  enum class State { kReady, kAtWarp, kAtBlock, kAtCluster, kDone };
  // A context only begins a fiber: switching by it each time would be a system call each time.
  struct Fiber {
    ucontext_t context;
    void* place[5];
    bool begun;
    State state;
  };
  static constexpr size_t kStack = 64 * 1024;

  // No frame is ever left by these jumps, so that AddressSanitizer need not hear of them, which takes it long.
  __attribute__((noinline, no_sanitize_address)) void stop(State state) {
    Fiber& own = fibers_[current_];
    own.state = state;
    own.begun = true;
    if (__builtin_setjmp(own.place) == 0) __builtin_longjmp(home_place_, 1);
  }

  __attribute__((noinline, no_sanitize_address)) void resume(Fiber& fiber) {
    if (__builtin_setjmp(home_place_) != 0) return;
    if (fiber.begun) __builtin_longjmp(fiber.place, 1);
    setcontext(&fiber.context);
  }

  __attribute__((no_sanitize_address)) static void enter();

  // Opens the barrier of a warp that all its threads have reached.
  bool release_warp(unsigned warp) {
    const unsigned first = warp * kWarp, end = std::min<unsigned>(first + kWarp, fibers_.size());
    for (unsigned t = first; t < end; ++t) {
      if (fibers_[t].state != State::kAtWarp) return false;
    }
    for (unsigned t = first; t < end; ++t) fibers_[t].state = State::kReady;
    return true;
  }

  // Opens the barrier of the block that begins with fiber `first`, if all its threads have reached it.
  bool release_block(unsigned first) {
    for (unsigned t = first; t < first + each_; ++t) {
      if (fibers_[t].state != State::kAtBlock) return false;
    }
    for (unsigned t = first; t < first + each_; ++t) fibers_[t].state = State::kReady;
    return true;
  }

  // Opens every barrier that all threads have reached; false when all threads are done.
  bool release() {
    unsigned done = 0, at_block = 0;
    bool opened = false;
    for (const Fiber& fiber : fibers_) {
      done += fiber.state == State::kDone;
      at_block += fiber.state == State::kAtBlock;
      opened |= fiber.state == State::kReady;
    }
    if (done == fibers_.size()) return false;
    for (unsigned warp = 0; warp * kWarp < fibers_.size(); ++warp) opened |= release_warp(warp);
    for (unsigned first = 0; first < fibers_.size(); first += each_) opened |= release_block(first);
    if (!opened) {
      std::fprintf(stderr, "a barrier that not all threads reach: %u of %zu wait at the block's, %u are done\n", at_block,
                   fibers_.size(), done);
      std::abort();
    }
    return true;
  }

  struct Free {
    void operator()(unsigned char* memory) const { operator delete[](memory, std::align_val_t(128)); }
  };

  const std::function<void()>* body_ = nullptr;
  std::unique_ptr<unsigned char[], Free> shared_;
  std::vector<std::unique_ptr<char[]>> stacks_;
  std::vector<Fiber> fibers_;
  std::vector<uint64_t> votes_;
  std::vector<unsigned> arrivals_;  // the phase of the cluster's barrier in which each thread arrived last
  void* home_place_[5];
  size_t shared_size_ = 0;
  unsigned current_ = 0, each_ = 1, arrived_ = 0, phase_ = 0;
};

inline Block block;
inline Order order = Order::kForward;
inline std::mt19937 generator(5);
inline int launches = 0;
inline Index block_index, grid_size;

inline void Block::enter() {
  (*block.body_)();
  block.fibers_[block.current_].state = State::kDone;
  __builtin_longjmp(block.home_place_, 1);
}

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

inline int __syncthreads_count(int wanted) {
  auto& block = vtexport::emulator::block;
  block.say(wanted != 0);
  block.wait(true);
  int count = 0;
  for (unsigned t = 0; t < block.threads(); ++t) count += block.heard<bool>(t);
  block.wait(true);  // no thread writes a new word before all have read the old ones
  return count;
}

inline unsigned __ballot_sync(unsigned, bool wanted) {
  auto& block = vtexport::emulator::block;
  block.say(wanted);
  block.wait(false);
  unsigned ballot = 0;
  const unsigned first = block.thread() / block.kWarp * block.kWarp;
  for (unsigned lane = 0; lane < block.kWarp; ++lane) ballot |= static_cast<unsigned>(block.heard<bool>(first + lane)) << lane;
  block.wait(false);
  return ballot;
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  auto& block = vtexport::emulator::block;
  block.say(value);
  block.wait(false);
  const T other = block.heard<T>(block.thread() ^ static_cast<unsigned>(mask));
  block.wait(false);
  return other;
}

// From the lane `from` gives for this lane; a lane outside the warp stands for this one.
template <typename T, typename From>
T shuffled(T value, From from) {
  auto& block = vtexport::emulator::block;
  const unsigned lane = block.thread() % block.kWarp, source = from(lane);
  block.say(value);
  block.wait(false);
  const T other = block.heard<T>(block.thread() - lane + (source < block.kWarp ? source : lane));
  block.wait(false);
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

// Threads take turns only at barriers.
inline int atomicAdd(int* to, int value) {
  const int before = *to;
  *to += value;
  return before;
}

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

// Matrices of a warp: every lane holds a copy of the whole matrix, and writes its own share of a result.
namespace nvcuda::wmma {

struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major;
struct col_major;
enum layout_t { mem_row_major, mem_col_major };

template <typename Use, int M, int N, int K, typename T, typename Layout = void>
struct fragment {
  float at[16][16];  // of matrix_b: at[column][k]
};

template <typename F>
void fill_fragment(F& to, float value) {
  for (auto& row : to.at) {
    for (float& number : row) number = value;
  }
}

inline void check_address(const void* memory, unsigned stride, size_t element) {
  if (reinterpret_cast<uintptr_t>(memory) % 32 != 0 || stride * element % 16 != 0) {
    std::fprintf(stderr, "a tile that tensor cores cannot load: address %p, stride %u\n", memory, stride);
    std::abort();
  }
}

template <typename Use, typename T, typename Layout>
void load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout>& to, const T* from, unsigned stride) {
  check_address(from, stride, sizeof(T));
  vtexport::emulator::block.wait(false);
  for (unsigned i = 0; i < 16; ++i) {
    for (unsigned k = 0; k < 16; ++k) to.at[i][k] = static_cast<float>(from[i * stride + k]);
  }
}

template <typename D, typename A, typename B>
void mma_sync(D& to, const A& a, const B& b, const D& c) {
  const unsigned lane = vtexport::emulator::block.thread() % 32, first = lane / 2, half = lane % 2 * 8;
  for (unsigned column = half; column < half + 8; ++column) {
    float sum = c.at[first][column];
    for (unsigned k = 0; k < 16; ++k) sum += a.at[first][k] * b.at[column][k];
    to.at[first][column] = sum;
  }
}

template <typename F>
void store_matrix_sync(float* to, const F& from, unsigned stride, layout_t) {
  check_address(to, stride, sizeof(float));
  const unsigned lane = vtexport::emulator::block.thread() % 32, first = lane / 2, half = lane % 2 * 8;
  for (unsigned column = half; column < half + 8; ++column) to[first * stride + column] = from.at[first][column];
  vtexport::emulator::block.wait(false);
}

}  // namespace nvcuda::wmma

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
    if (launch.block > 1024 || launch.shared > most_shared() || grid.x == 0 || grid.y == 0 || grid.z == 0 ||
        grid.y > 65535 || grid.z > 65535 || launch.cluster > (VTEXPORT_ARCHITECTURE >= 900 ? 8 : 1) ||
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
