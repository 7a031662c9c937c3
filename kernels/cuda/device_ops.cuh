// The machine instructions that CUDA C++ has no word for, and only those.
#ifndef STAGECOACH_KERNELS_CUDA_DEVICE_OPS_CUH_
#define STAGECOACH_KERNELS_CUDA_DEVICE_OPS_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/kernel_set.h"

namespace stagecoach::cuda {

// The block's dynamic shared memory.
__device__ inline uint8_t* SharedMemory() {
  extern __shared__ __align__(128) uint8_t shared_memory[];
  return shared_memory;
}

// --- Copies of the copy engine (bulk set), which complete on a barrier in shared memory. The
// barrier's phases alternate: the first one is 0, the next one 1, then 0 again.

__device__ inline uint32_t SharedAddress(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}
// One thread; others may wait on it after a barrier of theirs. A phase is complete after so many
// calls of Arrive or ExpectCopies, and the copies that these expect.
__device__ inline void InitBarrier(uint64_t* barrier, int arrivals) {
  asm volatile(
      "mbarrier.init.shared::cta.b64 [%0], %1;\n\tfence.mbarrier_init.release.cluster;" ::"r"(
          SharedAddress(barrier)),
      "r"(arrivals)
      : "memory");
}
__device__ inline void InitCopyBarrier(uint64_t* barrier) { InitBarrier(barrier, 1); }
// What the thread has written is seen by those that have awaited the phase.
__device__ inline void Arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(SharedAddress(barrier)) : "memory");
}
// One thread: the phase is complete when copies of so many bytes are.
__device__ inline void ExpectCopies(uint64_t* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(SharedAddress(barrier)),
      "r"(bytes)
      : "memory");
}
// bytes: a multiple of 16, as are both addresses. Nobody reads `shared` any more.
__device__ inline void CopyBulk(void* shared, const void* global, uint32_t bytes,
                                uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(SharedAddress(shared)),
      "l"(global), "r"(bytes), "r"(SharedAddress(barrier))
      : "memory");
}
// Copies that begin after this come after the thread's reads of shared memory before it, which may
// still be under way otherwise.
__device__ inline void FenceBeforeCopies() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// Returns when the phase is complete, and what it stands for visible.
__device__ inline void AwaitPhase(const uint64_t* barrier, uint32_t phase) {
  asm volatile(
      "{\n\t.reg .pred done;\n"
      "AGAIN_%=:\n\t"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
      "@!done bra AGAIN_%=;\n\t}" ::"r"(SharedAddress(barrier)),
      "r"(phase)
      : "memory");
}

// 16 bytes, by the thread itself, or (!any) as many zeros; there when it has called AwaitCopies.
__device__ inline void CopyVector(void* shared, const void* global, bool any) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(SharedAddress(shared)),
               "l"(global), "r"(any ? 16 : 0)
               : "memory");
}
__device__ inline void AwaitCopies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// One lane of the warp, all of which call this and wait for each other, always the same one. Better
// than a lane's number: the compiler knows that there is only one, and needs no loop around its
// copies. But it takes for granted that the lanes are together: apart, there would be one in each
// part.
__device__ inline bool IsElected() {
  uint32_t elected;
  __syncwarp();
  asm volatile(
      "{\n\t.reg .pred one;\n\t"
      "elect.sync _|one, 0xffffffff;\n\t"
      "selp.u32 %0, 1, 0, one;\n\t}"
      : "=r"(elected));
  return elected != 0;
}

// --- Hints that memory will be read soon, for the second-level cache. What is there then is what
// other kernels have written by the time of the read.

// A cache line.
__device__ inline void PrefetchLine(const void* global) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global) : "memory");
}
// bytes: a multiple of 16, as is the address.
__device__ inline void PrefetchBulk(const void* global, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global), "r"(bytes) : "memory");
}

// --- Stores into the shared memory of a cluster's other blocks (bulk set). Every
// thread of the cluster calls TellClusterOfStart, AwaitCluster, stores, and calls ArriveAtCluster
// and AwaitCluster.

// Others' stores into this block's shared memory need it to have started, and nothing else.
__device__ inline void TellClusterOfStart() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
// What the thread has stored in the cluster is seen by those that have awaited this.
__device__ inline void ArriveAtCluster() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.aligned;" ::: "memory");
}
// Returns when all threads of all blocks have arrived.
__device__ inline void AwaitCluster() {
  __syncwarp();
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
}
// For StoreInCluster: what is this block's shared memory at `own`, in the cluster's block `rank`.
__device__ inline uint32_t AddressInCluster(const void* own, uint32_t rank) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(SharedAddress(own)), "r"(rank));
  return address;
}
// Two floats, at a multiple of 8 bytes. Loads of the thread may move past it: it hides nothing.
__device__ inline void StoreInCluster(uint32_t address, float2 pair) {
  asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(pair.x),
               "f"(pair.y));
}

// --- Matrix products of a warp: d[16][8] += a[16][16] * b[16][8], halves into float32. With g =
// lane / 4 and t = lane % 4 a lane holds pairs of halves
//   a0: row g,     columns 2t, 2t + 1     a2: row g,     columns 2t + 8, 2t + 9
//   a1: row g + 8, columns 2t, 2t + 1     a3: row g + 8, columns 2t + 8, 2t + 9
//   b0: rows 2t, 2t + 1 of column g       b1: rows 2t + 8, 2t + 9 of column g
//   d[0], d[1]: row g, columns 2t, 2t + 1;   d[2], d[3]: row g + 8, the same
__device__ inline void MultiplyAdd(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                   uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// d = a * b.
__device__ inline void Multiply(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%10,%10,%10,%10};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(0.0f));
}

// --- Barriers

// One of the block's barriers 1 to 15, for so many threads of it, whole warps. Those that arrive do
// not wait; what they have written is seen by those that do.
__device__ inline void NamedBarrier(int barrier, int threads) {
  asm volatile("barrier.sync.aligned %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ inline void ArriveAtNamedBarrier(int barrier, int threads) {
  asm volatile("barrier.arrive.aligned %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// --- Programmatic stream serialisation; of the plain set kernels run in turn anyway.

// Returns when the kernel before this one in the stream is complete and its writes are visible.
__device__ inline void WaitForPreviousKernel() {
  if constexpr (kBulkCode) asm volatile("griddepcontrol.wait;" ::: "memory");
}
// Lets the next kernel in the stream start as soon as every block has called this.
__device__ inline void LetNextKernelStart() {
  if constexpr (kBulkCode) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_DEVICE_OPS_CUH_
