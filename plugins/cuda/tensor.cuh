// Instructions that CUDA C++ has no plain words for: loads of matrices for tensor cores and products on them, copies
// into shared memory that run beside the arithmetic, clusters of blocks, and launches that overlap. Everything compiles
// for every GPU; what an older one lacks is replaced here where a replacement exists, and else says so in its comment.
// plugins/tests/emulator has a file of the same name, which does the same on a CPU.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/fragments.cuh"
#include "cuda/launch.cuh"
#include "cuda/number.cuh"

namespace vtexport::cuda {

__device__ inline uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Four 8 x 8 matrices from shared memory: lane l points to row l % 8 of matrix l / 8, sixteen bytes, aligned to them. All
// lanes of the warp must call it.
__device__ inline Tile16 load_matrices(const void* row) {
  Tile16 to;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to.x[0]), "=r"(to.x[1]), "=r"(to.x[2]), "=r"(to.x[3])
               : "r"(shared_address(row))
               : "memory");
  return to;
}

// The 16 x 16 tile at `tile`, whose rows lie `stride` elements apart.
template <typename T>
__device__ inline Tile16 load_tile(const T* tile, int stride) {
  static_assert(sizeof(T) == 2);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  return load_matrices(tile + lane % 16 * stride + lane / 16 * 8);
}

// sum[i][j] += a[i] · b[8 half + j] for the 16 rows of a and eight rows of b. Only where kTensorCores<T>.
template <typename T>
__device__ inline void multiply(Sum16x8& sum, const Tile16& a, const Tile16& b, int half) {
#if VTEXPORT_ARCHITECTURE >= 800
  if constexpr (sizeof(T) == 2 && kTensorCores<T>) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
          "{%0, %1, %2, %3};"
          : "+f"(sum.x[0]), "+f"(sum.x[1]), "+f"(sum.x[2]), "+f"(sum.x[3])
          : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b.x[half]), "r"(b.x[half + 2]));
    } else {
      asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
          "{%0, %1, %2, %3};"
          : "+f"(sum.x[0]), "+f"(sum.x[1]), "+f"(sum.x[2]), "+f"(sum.x[3])
          : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b.x[half]), "r"(b.x[half + 2]));
    }
  }
#elif VTEXPORT_ARCHITECTURE >= 750
  if constexpr (sizeof(T) == 2 && kTensorCores<T>) {
    for (int k = 0; k < 2; ++k) {  // eight elements at a time
      asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
          : "+f"(sum.x[0]), "+f"(sum.x[1]), "+f"(sum.x[2]), "+f"(sum.x[3])
          : "r"(a.x[2 * k]), "r"(a.x[2 * k + 1]), "r"(b.x[half + 2 * k]));
    }
  }
#endif
}

// Copies sixteen bytes from global to shared memory, or zeros if not `wanted`; both addresses are aligned to sixteen
// bytes, and `global` is then not read. The bytes are there after wait_copies and a barrier.
__device__ inline void copy16(void* shared, const void* global, bool wanted) {
#if VTEXPORT_ARCHITECTURE >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(wanted ? 16 : 0)
               : "memory");
#else
  *static_cast<uint4*>(shared) = wanted ? *static_cast<const uint4*>(global) : make_uint4(0, 0, 0, 0);
#endif
}

// Ends a group of this thread's copies.
__device__ inline void commit_copies() {
#if VTEXPORT_ARCHITECTURE >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for all groups of this thread's copies but the last kLeft.
template <int kLeft>
__device__ inline void wait_copies() {
#if VTEXPORT_ARCHITECTURE >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#endif
}

// The block's number in its cluster. Below sm_90, every block is a cluster of its own.
__device__ inline unsigned cluster_rank() {
#if VTEXPORT_ARCHITECTURE >= 900
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}

// The barrier of a cluster in two halves: what was written before a thread arrived, all threads of the cluster see
// after they waited. All threads of all blocks must do both, by turns.
__device__ inline void cluster_arrive() {
#if VTEXPORT_ARCHITECTURE >= 900
  __syncwarp();  // "aligned" asks that the warp's threads arrive as one
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
__device__ inline void cluster_wait() {
#if VTEXPORT_ARCHITECTURE >= 900
  __syncwarp();
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

// Two floats from the shared memory of block `rank` of the cluster, where this block has `own`, aligned to eight bytes.
__device__ inline float2 load_of_rank(const float2* own, unsigned rank) {
#if VTEXPORT_ARCHITECTURE >= 900
  float2 value;
  uint32_t theirs;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(theirs) : "r"(shared_address(own)), "r"(rank));
  asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];" : "=f"(value.x), "=f"(value.y) : "r"(theirs) : "memory");
  return value;
#else
  return *own;
#endif
}

// With the launch before it on the stream, if Launcher let this one begin early: waits until that has ended and its
// results are there. Before this, a kernel reads nothing that an earlier launch writes, and writes nothing that one reads.
__device__ inline void wait_for_previous() {
#if VTEXPORT_ARCHITECTURE >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// From here on the next launch may begin as blocks end; it still waits for this one's results.
__device__ inline void let_next_begin() {
#if VTEXPORT_ARCHITECTURE >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace vtexport::cuda
