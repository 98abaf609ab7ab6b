// Replaces plugins/cuda/tensor.cuh in the emulator. A matrix's row that is not aligned ends the program. A copy into
// shared memory arrives only at wait_copies, and until then there is NaN, so that a kernel which reads either the new
// contents too early or the old ones too late gives other bits.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "cuda/fragments.cuh"
#include "cuda/launch.cuh"
#include "cuda/number.cuh"

namespace vtexport::cuda {

namespace emulated {

constexpr unsigned kMostThreads = 8 * 1024, kLanes = 32;  // of a cluster

// What a lane shows to its warp in a product: its registers of a, and of eight rows of b.
struct Shown {
  uint32_t a[4], b[2];
};
inline Shown shown[kMostThreads];

// Copies that a thread has begun, in groups, the oldest first.
struct Copy {
  void* to;
  unsigned char bytes[16];
};
inline std::vector<std::vector<Copy>> begun[kMostThreads];

inline void check_aligned(const void* memory) {
  if (reinterpret_cast<uintptr_t>(memory) % 16 == 0) return;
  std::fprintf(stderr, "sixteen bytes that are not aligned to them: %p\n", memory);
  std::abort();
}

template <typename T>
float element(uint32_t pair, unsigned number) {
  const uint16_t bits = static_cast<uint16_t>(pair >> (16 * number));
  T value;
  std::memcpy(static_cast<void*>(&value), &bits, sizeof bits);
  return static_cast<float>(value);
}

// The matrices whose rows the lanes point to; row i of a transposed one is column i of the other.
inline Tile16 load(const void* row) {
  auto& block = vtexport::emulator::block;
  const unsigned lane = block.thread() % kLanes, first = block.thread() - lane;
  check_aligned(row);
  block.say(static_cast<const uint16_t*>(row));
  block.meet();
  Tile16 to;
  for (unsigned matrix = 0; matrix < 4; ++matrix) {
    uint32_t pair = 0;
    for (unsigned i = 0; i < 2; ++i) {
      const unsigned r = lane / 4, c = 2 * (lane % 4) + i;
      pair |= static_cast<uint32_t>(block.heard<const uint16_t*>(first + 8 * matrix + r)[c]) << (16 * i);
    }
    to.x[matrix] = pair;
  }
  block.meet();
  return to;
}

}  // namespace emulated

inline Tile16 load_matrices(const void* row) { return emulated::load(row); }

template <typename T>
Tile16 load_tile(const T* tile, int stride) {
  static_assert(sizeof(T) == 2);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  return load_matrices(tile + lane % 16 * stride + lane / 16 * 8);
}

template <typename T>
void multiply(Sum16x8& sum, const Tile16& a, const Tile16& b, int half) {
  using emulated::shown;
  auto& block = vtexport::emulator::block;
  const unsigned lane = block.thread() % emulated::kLanes, first = block.thread_of_cluster() - lane;
  emulated::Shown& own = shown[block.thread_of_cluster()];
  std::memcpy(own.a, a.x, sizeof own.a);
  own.b[0] = b.x[half];
  own.b[1] = b.x[half + 2];
  block.wait(false);
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane / 4, lower = i / 2, column = 2 * (lane % 4) + i % 2;
    float total = sum.x[i];
    for (unsigned k = 0; k < 16; ++k) {
      const emulated::Shown &left = shown[first + 4 * row + k % 8 / 2], &right = shown[first + 4 * column + k % 8 / 2];
      total += emulated::element<T>(left.a[lower + k / 8 * 2], k % 2) * emulated::element<T>(right.b[k / 8], k % 2);
    }
    sum.x[i] = total;
  }
  block.wait(false);
}

inline void copy16(void* shared, const void* global, bool wanted) {
  emulated::check_aligned(shared);
  if (wanted) emulated::check_aligned(global);
  emulated::Copy copy{shared, {}};
  if (wanted) std::memcpy(copy.bytes, global, sizeof copy.bytes);
  if (!kAsyncCopies) {
    std::memcpy(copy.to, copy.bytes, sizeof copy.bytes);
    return;
  }
  // It may arrive at any time from now on: whoever still reads what was there reads NaN.
  std::memset(shared, 0xFF, sizeof copy.bytes);
  auto& groups = emulated::begun[vtexport::emulator::block.thread_of_cluster()];
  if (groups.empty()) groups.emplace_back();
  groups.back().push_back(copy);
}

inline void commit_copies() { emulated::begun[vtexport::emulator::block.thread_of_cluster()].emplace_back(); }

template <int kLeft>
void wait_copies() {
  // The last group is still open.
  auto& groups = emulated::begun[vtexport::emulator::block.thread_of_cluster()];
  while (groups.size() > kLeft + 1) {
    for (const emulated::Copy& copy : groups.front()) std::memcpy(copy.to, copy.bytes, sizeof copy.bytes);
    groups.erase(groups.begin());
  }
}

inline unsigned cluster_rank() { return vtexport::emulator::block.rank(); }
inline void cluster_arrive() { vtexport::emulator::block.arrive(); }
inline void cluster_wait() { vtexport::emulator::block.wait_for_cluster(); }
inline float2 load_of_rank(const float2* own, unsigned rank) {
  return *static_cast<const float2*>(vtexport::emulator::block.shared_of(rank, own));
}

inline void wait_for_previous() { vtexport::emulator::block.waited_for_previous(); }
inline void let_next_begin() {}

}  // namespace vtexport::cuda
