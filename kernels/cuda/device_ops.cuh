// The machine instructions that CUDA C++ has no word for, and only those.
#ifndef STAGECOACH_KERNELS_CUDA_DEVICE_OPS_CUH_
#define STAGECOACH_KERNELS_CUDA_DEVICE_OPS_CUH_

#include <cuda_runtime.h>

#include <cstdint>

namespace stagecoach::cuda {

// The block's dynamic shared memory.
__device__ inline uint8_t* SharedMemory() {
  extern __shared__ __align__(128) uint8_t shared_memory[];
  return shared_memory;
}

// --- Copies from global to shared memory that complete later, past the first-level cache.

// 16 bytes, both addresses 16-byte aligned.
__device__ inline void CopyAsync16(void* shared, const void* global) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(address), "l"(global)
               : "memory");
}
// Ends a group of this thread's copies (which may be empty).
__device__ inline void CommitCopies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most the kPending youngest groups of this thread are under way.
template <int kPending>
__device__ inline void WaitCopies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// --- Matrix products of a warp: d[16][8] = a[16][32 or 16] * b[32 or 16][8], exact in int32. With
// g = lane / 4 and t = lane % 4 a lane holds
//   a[0]: row g,     columns 4t .. 4t + 3       a[2]: row g,     columns 16 + 4t ..
//   a[1]: row g + 8, columns 4t .. 4t + 3       a[3]: row g + 8, columns 16 + 4t ..
//   b.x:  rows 4t .. 4t + 3 of column g         b.y:  rows 16 + 4t .. of column g
//   d[0], d[1]: row g, columns 2t and 2t + 1;   d[2], d[3]: row g + 8, the same
// a is uint8 or (kSigned) int8, b is int8.
template <bool kSigned>
__device__ inline void MultiplyK32(int (&d)[4], const uint32_t (&a)[4], uint2 b) {
  if constexpr (kSigned) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%10,%10,%10,%10};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y), "r"(0));
  } else {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%10,%10,%10,%10};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y), "r"(0));
  }
}
// a0 and a1 as a[0] and a[1] above, b as b.x.
template <bool kSigned>
__device__ inline void MultiplyK16(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  if constexpr (kSigned) {
    asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
        "{%7,%7,%7,%7};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a0), "r"(a1), "r"(b), "r"(0));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
        "{%7,%7,%7,%7};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a0), "r"(a1), "r"(b), "r"(0));
  }
}

// Exact.
__device__ inline float HalfBitsToFloat(uint32_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<uint16_t>(bits)));
  return value;
}

// --- Programmatic stream serialisation.

// Returns when the kernel before this one in the stream is complete and its writes are visible.
__device__ inline void WaitForPreviousKernel() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}
// Lets the next kernel in the stream start as soon as every block has called this.
__device__ inline void LetNextKernelStart() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// --- Barriers and clusters.

// A barrier among `threads` threads (whole warps) of the block; kId: 1 .. 15.
template <int kId>
__device__ inline void NamedBarrier(int threads) {
  asm volatile("barrier.sync %0, %1;" ::"n"(kId), "r"(threads) : "memory");
}
__device__ inline uint32_t ClusterRank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// All threads of all blocks of the cluster; orders their accesses to each other's shared memory.
__device__ inline void ClusterBarrier() {
  asm volatile("barrier.cluster.arrive.aligned;\n\tbarrier.cluster.wait.aligned;" ::: "memory");
}
// The float at this block's shared address `own`, but in the cluster's block `rank`.
__device__ inline float LoadFromCluster(const float* own, uint32_t rank) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(own));
  uint32_t remote;
  float value;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(remote) : "memory");
  return value;
}

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_DEVICE_OPS_CUH_
