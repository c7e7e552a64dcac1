// Instructions of compute capability 9.0, each in one function: mbarriers, the tensor memory
// accelerator (TMA), warpgroup matrix products, clusters. tests/host_cuda has them for the host.
#pragma once
#include <cuda.h>

#include <cstdint>

#include "cuda_device.cuh"

namespace stf {

#ifdef __CUDACC__

// Clusters.

STF_DEVICE uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of the cluster that have not left wait for each other.
STF_DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// mbarriers. A phase ends when `arrivals` have arrived and all bytes expected in it have landed;
// its parity is 0 for the first phase, 1 for the second, 0 for the third ... They order what the
// TMA writes and the matrix products read; for ordinary stores to another block's memory they would
// have to fence the cluster (.release.cluster), which costs a wait for all memory traffic.

STF_DEVICE void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

// After the barriers' init and before cluster_sync: the cluster and the TMA see them.
STF_DEVICE void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives at a barrier of this block and adds `bytes` to what its phase waits for.
STF_DEVICE void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

// Arrives at the barrier that lies in block `rank` of the cluster where `barrier` lies in this one.
STF_DEVICE void barrier_arrive(uint64_t* barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// Waits until the phase of this parity has ended: returns at once if it is the one before.
STF_DEVICE void barrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred ended;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n"
      "@!ended bra again;\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// The TMA. A box of the map's size at element (x, y, z) goes to `shared`, zero where it is outside
// the tensor, and all its bytes, those too, complete at `full`.

STF_DEVICE void tma_prefetch(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

STF_DEVICE void tma_load(void* shared, const CUtensorMap* map, int x, int y, int z,
                         uint64_t* full) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(shared_address(shared)),
      "l"(map), "r"(x), "r"(y), "r"(z), "r"(shared_address(full))
      : "memory");
}

// To the same place in each block of `ranks`, a bit each, completing at the same barrier there.
STF_DEVICE void tma_multicast(void* shared, const CUtensorMap* map, int x, int y, int z,
                              uint64_t* full, uint16_t ranks) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(shared_address(shared)),
      "l"(map), "r"(x), "r"(y), "r"(z), "r"(shared_address(full)), "h"(ranks)
      : "memory");
}

// Warpgroups: registers, and products that run on their own until waited for.

template <int Count>
STF_DEVICE void registers_raise() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Count));
}

template <int Count>
STF_DEVICE void registers_lower() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Count));
}

// Between other uses of the sums' registers and the first product into them.
STF_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

STF_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most `Pending` of the committed groups still run.
template <int Pending>
STF_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

#define STF_SUMS_8(i)                                                                        \
  "+r"(sums[i]), "+r"(sums[i + 1]), "+r"(sums[i + 2]), "+r"(sums[i + 3]), "+r"(sums[i + 4]), \
      "+r"(sums[i + 5]), "+r"(sums[i + 6]), "+r"(sums[i + 7])
#define STF_SUMS_32(i) STF_SUMS_8(i), STF_SUMS_8(i + 8), STF_SUMS_8(i + 16), STF_SUMS_8(i + 24)
#define STF_NAMES_96                                                                 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define STF_NAMES_128                                                                    \
  STF_NAMES_96                                                                           \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, "   \
  "%110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, " \
  "%124, %125, %126, %127"

// sums[m][n] = sum over 32 k of a[m][k] b[n][k], added to what they are if `accumulate`: 64 rows
// by N columns of int8. A thread's part: warp w of the group and lane l hold, at 4 j + 2 h + e, row
// 16 w + l / 4 + 8 h and column 8 j + 2 (l % 4) + e.
template <int N>
STF_DEVICE void wgmma(int32_t (&sums)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(N == 192 || N == 256, "64 columns for each of three or four digits");
  if constexpr (N == 256) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %130, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k32.s32.s8.s8 {" STF_NAMES_128 "}, %128, %129, add;\n}"
        : STF_SUMS_32(0), STF_SUMS_32(32), STF_SUMS_32(64), STF_SUMS_32(96)
        : "l"(a), "l"(b), "r"(int{accumulate}));
  } else {
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %98, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n192k32.s32.s8.s8 {" STF_NAMES_96 "}, %96, %97, add;\n}"
        : STF_SUMS_32(0), STF_SUMS_32(32), STF_SUMS_32(64)
        : "l"(a), "l"(b), "r"(int{accumulate}));
  }
}

#undef STF_SUMS_8
#undef STF_SUMS_32
#undef STF_NAMES_96
#undef STF_NAMES_128

#else
}  // namespace stf
#include "cuda_hopper_on_host.h"
namespace stf {
#endif

constexpr int kSwizzleBytes = 128;  // a row of an operand in shared memory, and of a TMA box
constexpr int kSwizzleRows = 8;     // whose 16-byte parts are permuted alike; 1024-byte aligned
constexpr int kProductTerms = 32;   // of one wgmma on int8

// An operand of wgmma: rows of 128 bytes, one after the other, as the TMA's 128-byte swizzle lays
// them. Bits 0-13 and 32-45 count 16 bytes: where it begins, and from eight rows to the next.
STF_DEVICE uint64_t operand(const void* rows) {
  const uint64_t begin = (shared_address(rows) & 0x3ffff) >> 4;
  const uint64_t unused = 1;  // the other offset: one swizzled row holds all of k
  const uint64_t eight_rows = kSwizzleRows * kSwizzleBytes >> 4;
  const uint64_t swizzle_128 = 1;
  return begin | unused << 16 | eight_rows << 32 | swizzle_128 << 62;
}

// The same rows, `products` times 32 bytes of k further on.
STF_DEVICE uint64_t advanced(uint64_t operand, int products) {
  return operand + products * (kProductTerms >> 4);
}

}  // namespace stf
