// What the kernels ask of the machine beyond plain C++, each in one small function.
//
// Under nvcc these are PTX instructions. Compiled for the host, tests/host_cuda supplies the same
// functions by the documented behaviour of each instruction.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#define STF_DEVICE __device__ __forceinline__

namespace stf {

using SharedAddress = uint32_t;  // in the shared window of the block
constexpr unsigned kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffff;

#ifdef __CUDACC__

// The block's shared memory of type T: one for each T of a kernel.
template <class T>
STF_DEVICE T& shared_memory() {
  __shared__ T memory;
  return memory;
}

// The dynamic shared memory of the launch.
STF_DEVICE uint8_t* dynamic_shared_memory() {
  extern __shared__ __align__(1024) uint8_t memory[];
  return memory;
}

STF_DEVICE SharedAddress shared_address(const void* memory) {
  return static_cast<SharedAddress>(__cvta_generic_to_shared(memory));
}

// 16 bytes from global to shared memory, past the registers; those after `bytes` become zero. The
// L2 cache fetches 128 bytes.
STF_DEVICE void cp_async_16(SharedAddress to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(bytes)
               : "memory");
}

// The same of 8 bytes.
STF_DEVICE void cp_async_8(SharedAddress to, const void* from, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
}

// Closes a group of this thread's copies.
STF_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for this thread's copies, but for the latest `Groups` groups.
template <int Groups>
STF_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Groups) : "memory");
}

// Four 8 x 16-byte matrices; lane 8 m + r names row r of matrix m. Lane 4 r + c gets bytes 4 c to
// 4 c + 3 of row r of each.
STF_DEVICE void ldmatrix(uint32_t (&out)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(row)
               : "memory");
}

// sums += a b for int8 a [16, 32] and b [32, 8], as four and two matrices of `ldmatrix`:
// a's are rows 0..7, 8..15 of bytes 0..15, then of bytes 16..31; b's are columns, 16 bytes each.
// sums: rows lane / 4 and 8 more, columns 2 (lane % 4) and one more; columns fastest.
STF_DEVICE void mma(int32_t (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// A barrier of `threads` threads, whole warps, of the block; 0 is __syncthreads' own.
STF_DEVICE void named_barrier(int name, int threads) {
  asm volatile("barrier.cta.sync %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

#else
}  // namespace stf
#include "cuda_device_on_host.h"
namespace stf {
#endif

STF_DEVICE unsigned lane_id() { return threadIdx.x % kWarp; }

// op over the values of each `Lanes` lanes in a row, in all of them; op in any order.
template <unsigned Lanes = kWarp, class T, class Op>
STF_DEVICE T warp_reduce(T value, Op op) {
#pragma unroll
  for (unsigned step = Lanes / 2; step > 0; step /= 2)
    value = op(value, __shfl_xor_sync(kAllLanes, value, step));
  return value;
}

// op over the values of all `Threads` threads of the block, in all of them; op in any order.
template <unsigned Threads, class T, class Op>
STF_DEVICE T block_reduce(T value, Op op) {
  static_assert(Threads % kWarp == 0, "whole warps");
  struct Parts {
    T of[Threads / kWarp];
  };
  Parts& parts = shared_memory<Parts>();
  value = warp_reduce(value, op);
  __syncthreads();  // whoever still reads the parts of the call before
  if (lane_id() == 0) parts.of[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = parts.of[0];
#pragma unroll
  for (unsigned i = 1; i < Threads / kWarp; ++i) value = op(value, parts.of[i]);
  return value;
}

// Adds to an integer in global memory; two's complement knows no sign.
STF_DEVICE void atomic_add(int64_t* sum, int64_t value) {
  atomicAdd(reinterpret_cast<unsigned long long*>(sum), static_cast<unsigned long long>(value));
}

}  // namespace stf
