// Matrix products of a warpgroup: four neighbouring warps, the first one's number a multiple of 4,
// all of whose threads call these together. They go on by themselves once begun: until they have
// been awaited, nobody touches their results and factors.
//   d[64][kColumns] += a[64][16] * b[16][kColumns]
// A warp holds 16 rows of a and d as in a product of its own (device_ops.cuh): d[c] is d of columns
// 8c .. 8c + 7. Results have the bits of such products, which take their place where code is made
// for another architecture than 9.0a.
#ifndef STAGECOACH_KERNELS_CUDA_WIDE_PRODUCT_CUH_
#define STAGECOACH_KERNELS_CUDA_WIDE_PRODUCT_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/device_ops.cuh"

namespace stagecoach::cuda {

// The factor b: in shared memory as [2][kColumns][8] halves, 8 rows of b, one column after another,
// then the next 8.
template <int kColumns>
__device__ inline uint64_t WideFactor(const void* shared) {
  constexpr uint64_t kNextRows = kColumns * 16 >> 4, kNextColumns = 8 * 16 >> 4;
  return ((SharedAddress(shared) & 0x3ffff) >> 4) | kNextRows << 16 | kNextColumns << 32;
}
// What to add to a WideFactor for one that lies so many bytes behind it.
constexpr uint64_t WideFactorStep(int bytes) { return static_cast<uint64_t>(bytes >> 4); }

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// All threads of a warpgroup: from here on each has so many registers, a multiple of 8; more only
// if there are as many left.
template <int kRegisters>
__device__ inline void GiveUpRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void TakeRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Ahead of products whose registers other instructions have written.
__device__ inline void BeginWideProducts() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
// Those begun since the last call are a group.
__device__ inline void EndWideProducts() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Returns when all but the last kLeft groups are complete.
template <int kLeft>
__device__ inline void AwaitWideProducts() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}
// After AwaitWideProducts, ahead of any use of d.
template <int kTiles>
__device__ inline void AwaitedWideResult(float (&d)[kTiles][4]) {
#pragma unroll
  for (int i = 0; i < kTiles * 4; ++i) asm volatile("" : "+f"(d[i / 4][i % 4])::"memory");
}
// add: to d; otherwise d is the product alone.
template <int kColumns>
__device__ void MultiplyAddWide(float (&d)[kColumns / 8][4], uint32_t a0, uint32_t a1, uint32_t a2,
                                uint32_t a3, uint64_t b, bool add);
template <>
__device__ inline void MultiplyAddWide<32>(float (&d)[4][4], uint32_t a0, uint32_t a1, uint32_t a2,
                                           uint32_t a3, uint64_t b, bool add) {
  asm volatile(
      "{\n\t.reg .pred add;\n\t"
      "setp.ne.b32 add, %21, 0;\n\t"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
      "}, {%16, %17, %18, %19}, %20, add, 1, 1, 0;\n\t}"
      : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]),
        "+f"(d[1][2]), "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]),
        "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(static_cast<int>(add)));
}
template <>
__device__ inline void MultiplyAddWide<64>(float (&d)[8][4], uint32_t a0, uint32_t a1, uint32_t a2,
                                           uint32_t a3, uint64_t b, bool add) {
  asm volatile(
      "{\n\t.reg .pred add;\n\t"
      "setp.ne.b32 add, %37, 0;\n\t"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, "
      "%30, %31"
      "}, {%32, %33, %34, %35}, %36, add, 1, 1, 0;\n\t}"
      : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]),
        "+f"(d[1][2]), "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]),
        "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3]), "+f"(d[4][0]), "+f"(d[4][1]),
        "+f"(d[4][2]), "+f"(d[4][3]), "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]),
        "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]), "+f"(d[7][0]), "+f"(d[7][1]),
        "+f"(d[7][2]), "+f"(d[7][3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(static_cast<int>(add)));
}

#else  // by products of warps, which are complete when they return

template <int kRegisters>
__device__ inline void GiveUpRegisters() {}
template <int kRegisters>
__device__ inline void TakeRegisters() {}
__device__ inline void BeginWideProducts() {}
__device__ inline void EndWideProducts() {}
template <int kLeft>
__device__ inline void AwaitWideProducts() {}
template <int kTiles>
__device__ inline void AwaitedWideResult(float (&)[kTiles][4]) {}

__device__ inline uint32_t LoadShared(uint32_t address) {
  uint32_t word;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(address));
  return word;
}
template <int kColumns>
__device__ inline void MultiplyAddWide(float (&d)[kColumns / 8][4], uint32_t a0, uint32_t a1,
                                       uint32_t a2, uint32_t a3, uint64_t b, bool add) {
  const int lane = threadIdx.x % 32;
  const uint32_t own = (static_cast<uint32_t>(b) & 0x3fff) * 16 + lane / 4 * 16 + lane % 4 * 4;
#pragma unroll
  for (int c = 0; c < kColumns / 8; ++c) {
    if (!add) d[c][0] = d[c][1] = d[c][2] = d[c][3] = 0;
    const uint32_t word = own + c * 8 * 16;
    MultiplyAdd(d[c], a0, a1, a2, a3, LoadShared(word), LoadShared(word + kColumns * 16));
  }
}

#endif

}  // namespace stagecoach::cuda

#endif  // STAGECOACH_KERNELS_CUDA_WIDE_PRODUCT_CUH_
