// Kernels with a fault, or without: what the machine on the host must see (tests/test_cuda.py).
#include "cuda_device.cuh"
#include "cuda_launch.h"
#include "faults.h"

namespace stf {
namespace {

constexpr int kThreads = 96;

struct Numbers {
  alignas(16) int32_t at[kThreads * 4];
};

// Each thread's number goes to the next thread.
__global__ void barrier(const int32_t* in, int32_t* out, bool fault) {
  Numbers& shared = shared_memory<Numbers>();
  shared.at[threadIdx.x] = in[threadIdx.x];
  if (!fault) __syncthreads();
  out[threadIdx.x] = shared.at[(threadIdx.x + 1) % kThreads];
}

// The same from lane to lane.
__global__ void warp_barrier(const int32_t* in, int32_t* out, bool fault) {
  Numbers& shared = shared_memory<Numbers>();
  shared.at[threadIdx.x] = in[threadIdx.x];
  if (!fault) __syncwarp();
  out[threadIdx.x] = shared.at[threadIdx.x / kWarp * kWarp + (threadIdx.x + 1) % kWarp];
}

// Four numbers of each thread through a copy that does not wait.
__global__ void copy(const int32_t* in, int32_t* out, bool fault) {
  Numbers& shared = shared_memory<Numbers>();
  int32_t* mine = shared.at + 4 * threadIdx.x;
  cp_async_16(shared_address(mine), in + 4 * threadIdx.x, 16);
  cp_async_commit();
  if (!fault) cp_async_wait<0>();
  for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = mine[i];
}

// Two rounds through one buffer: the second copy must wait until the first one's data are read.
__global__ void copy_again(const int32_t* in, int32_t* out, bool fault) {
  Numbers& shared = shared_memory<Numbers>();
  for (int round = 0; round < 2; ++round, in += 4 * kThreads, out += 4 * kThreads) {
    cp_async_16(shared_address(shared.at + 4 * threadIdx.x), in + 4 * threadIdx.x, 16);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    const int other = (threadIdx.x + 40) % kThreads;
    for (int i = 0; i < 4; ++i) out[4 * other + i] = shared.at[4 * other + i];
    if (!fault) __syncthreads();
  }
}

__global__ void shared_bounds(const int32_t*, int32_t* out, bool fault) {
  Numbers& shared = shared_memory<Numbers>();
  int32_t* end = shared.at + kThreads * 4;
  (fault ? end : shared.at)[0] = 1;
  out[threadIdx.x] = 0;
}

__global__ void dynamic_bounds(const int32_t*, int32_t* out, bool fault) {
  dynamic_shared_memory()[fault ? 64 : 63] = 1;
  out[threadIdx.x] = 0;
}

__global__ void global_bounds(const int32_t* in, int32_t* out, bool fault) {
  out[threadIdx.x] = in[fault ? 8 * kThreads : 0];
}

__global__ void deadlock(const int32_t* in, int32_t* out, bool fault) {
  if (!fault || threadIdx.x < 40) __syncthreads();
  out[threadIdx.x] = in[threadIdx.x];
}

__global__ void other_collective(const int32_t* in, int32_t* out, bool fault) {
  const int32_t value = in[threadIdx.x];
  if (fault && lane_id() == 5)
    out[threadIdx.x] = __any_sync(kAllLanes, value);
  else
    out[threadIdx.x] = __shfl_xor_sync(kAllLanes, value, 1);
}

__global__ void lane_outside_mask(const int32_t* in, int32_t* out, bool fault) {
  out[threadIdx.x] = in[threadIdx.x];
  if (lane_id() < 16) out[threadIdx.x] = __shfl_sync(0xffff, in[threadIdx.x], fault ? 20 : 3);
}

__global__ void unaligned_rows(const int32_t*, int32_t* out, bool fault) {
  uint32_t found[4];
  ldmatrix(found, shared_address(shared_memory<Numbers>().at + 4 * lane_id() + (fault ? 1 : 0)));
  out[threadIdx.x] = 0;
}

__global__ void overflow(const int32_t*, int32_t* out, bool fault) {
  const uint32_t most = 0x80808080;  // -128 four times
  const uint32_t a[4] = {most, most, most, most};
  int32_t sums[4] = {};
  for (int i = 0; i < (fault ? 4096 : 4095); ++i) mma(sums, a, most, most);  // 2^19 each
  out[threadIdx.x] = sums[0];
}

__global__ void never_written(const int32_t*, int32_t* out, bool fault) {
  Numbers& shared = shared_memory<Numbers>();
  if (!fault) shared.at[threadIdx.x] = 0;
  out[threadIdx.x] = shared.at[threadIdx.x];
}

}  // namespace
}  // namespace stf

namespace host {

const std::vector<Faulty>& faulty_kernels() {
  static const std::vector<Faulty> all = {
      {"barrier", stf::barrier},
      {"warp_barrier", stf::warp_barrier},
      {"copy", stf::copy},
      {"copy_again", stf::copy_again},
      {"never_written", stf::never_written},
      {"shared_bounds", stf::shared_bounds},
      {"dynamic_bounds", stf::dynamic_bounds},
      {"global_bounds", stf::global_bounds},
      {"deadlock", stf::deadlock},
      {"other_collective", stf::other_collective},
      {"lane_outside_mask", stf::lane_outside_mask},
      {"unaligned_rows", stf::unaligned_rows},
      {"overflow", stf::overflow},
  };
  return all;
}

void run_faulty(const Faulty& faulty, const int32_t* in, int32_t* out, bool fault) {
  stf::launch(faulty.kernel, stf::Call{faulty.name, {}}, stf::Grid{1, stf::kThreads, 64}, nullptr,
              in, out, fault);
}

}  // namespace host
