// CUDA's names on the host, as far as csrc/ uses them; machine.h runs the kernels.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "machine.h"

#define __host__
#define __device__
#define __global__
#define __constant__ static const
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)

using std::max;
using std::min;

#define STF_VECTOR(type, name, bytes)                                           \
  struct alignas(2 * bytes) name##2 { type x, y; };                             \
  struct alignas(4 * bytes < 16 ? 4 * bytes : 16) name##4 { type x, y, z, w; }; \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }              \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
STF_VECTOR(signed char, char, 1)
STF_VECTOR(short, short, 2)
STF_VECTOR(int, int, 4)
STF_VECTOR(unsigned, uint, 4)
STF_VECTOR(float, float, 4)
STF_VECTOR(double, double, 8)
STF_VECTOR(long long, longlong, 8)
#undef STF_VECTOR

// Barriers and collectives.

inline void __syncthreads() { host::barrier(0, blockDim.x, 0, "__syncthreads"); }
inline int __syncthreads_count(int given) {
  return host::barrier(0, blockDim.x, given != 0, "__syncthreads_count");
}
inline int __syncthreads_or(int given) { return __syncthreads_count(given) > 0; }
inline int __syncthreads_and(int given) {
  return __syncthreads_count(given) == static_cast<int>(blockDim.x);
}

namespace host {

template <class T, class From>
T shuffle(unsigned mask, const char* what, T value, unsigned width, const From& from) {
  return meet<T>(mask, what, value, [&](auto in, auto out) {
    for (unsigned lane = 0; lane < kLanes; ++lane) {
      if (!(mask >> lane & 1)) continue;
      const unsigned base = lane / width * width, other = from(lane % width);
      const unsigned source = other < width ? base + other : lane;
      if (!(mask >> source & 1)) fail(std::string(what) + " from a lane that its mask leaves out");
      *out[lane] = *in[source];
    }
  });
}

inline uint32_t vote(unsigned mask, const char* what, int given) {
  return meet<uint32_t>(mask, what, given, [&](auto in, auto out) {
    uint32_t yes = 0;
    for (unsigned lane = 0; lane < kLanes; ++lane)
      if (mask >> lane & 1) yes |= static_cast<uint32_t>(*in[lane] != 0) << lane;
    for (unsigned lane = 0; lane < kLanes; ++lane)
      if (mask >> lane & 1) *out[lane] = yes;
  });
}

}  // namespace host

inline void __syncwarp(unsigned mask = 0xffffffff) { host::vote(mask, "__syncwarp", 0); }
inline unsigned __ballot_sync(unsigned mask, int given) {
  return host::vote(mask, "__ballot_sync", given);
}
inline int __any_sync(unsigned mask, int given) {
  return host::vote(mask, "__any_sync", given) != 0;
}
inline int __all_sync(unsigned mask, int given) {
  return host::vote(mask, "__all_sync", given) == mask;
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  // The source may differ from lane to lane.
  struct Given {
    T value;
    int lane;
  };
  return host::meet<T>(mask, "__shfl_sync", Given{value, lane}, [&](auto in, auto out) {
    for (unsigned to = 0; to < host::kLanes; ++to) {
      if (!(mask >> to & 1)) continue;
      const unsigned from = to / width * width + static_cast<unsigned>(in[to]->lane) % width;
      if (!(mask >> from & 1)) host::fail("__shfl_sync from a lane that its mask leaves out");
      *out[to] = in[from]->value;
    }
  });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  return host::shuffle(mask, "__shfl_xor_sync", value, width,
                       [=](unsigned lane) { return lane ^ lanes; });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes, int width = 32) {
  return host::shuffle(mask, "__shfl_up_sync", value, width,
                       [=](unsigned lane) { return lane - lanes; });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes, int width = 32) {
  return host::shuffle(mask, "__shfl_down_sync", value, width,
                       [=](unsigned lane) { return lane + lanes; });
}

inline void __threadfence() {}
inline void __threadfence_block() {}

// Atomics: fibers are not interrupted.

namespace host {
template <class T, class F>
T exchange(T* at, const F& change) {
  const T old = *at;
  *at = change(old);
  return old;
}
}  // namespace host

inline unsigned long long atomicAdd(unsigned long long* at, unsigned long long value) {
  return host::exchange(at, [=](unsigned long long old) { return old + value; });
}
inline unsigned atomicAdd(unsigned* at, unsigned value) {
  return host::exchange(at, [=](unsigned old) { return old + value; });
}
inline int atomicAdd(int* at, int value) {
  return host::exchange(at, [=](int old) { return old + value; });
}
template <class T>
T atomicMax(T* at, T value) {
  return host::exchange(at, [=](T old) { return old < value ? value : old; });
}
template <class T>
T atomicMin(T* at, T value) {
  return host::exchange(at, [=](T old) { return value < old ? value : old; });
}
template <class T>
T atomicExch(T* at, T value) {
  return host::exchange(at, [=](T) { return value; });
}
template <class T>
T atomicCAS(T* at, T expected, T value) {
  return host::exchange(at, [=](T old) { return old == expected ? value : old; });
}

// Small arithmetic.

template <class T>
T __ldg(const T* at) {
  return *at;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline long long __double_as_longlong(double x) {
  long long bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline double __longlong_as_double(long long bits) {
  double x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// The runtime.

using cudaStream_t = struct CUstream_st*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };

union cudaLaunchAttributeValue {
  struct {
    unsigned x, y, z;
  } clusterDim;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace host {

struct Device {  // what the kernels' callers are told
  int processors = 4, major = 9, minor = 0;
};
inline Device device;
inline constexpr int kDevices = 2;
inline int current_device = 0;
inline std::map<const void*, size_t> dynamic_shared;  // allowed to each kernel

}  // namespace host

inline const char* cudaGetErrorName(cudaError_t status) {
  return status == cudaErrorInvalidDevice          ? "cudaErrorInvalidDevice"
         : status == cudaErrorInvalidConfiguration ? "cudaErrorInvalidConfiguration"
         : status == cudaErrorInvalidValue         ? "cudaErrorInvalidValue"
                                                   : "cudaSuccess";
}
inline const char* cudaGetErrorString(cudaError_t) { return "said the host"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline cudaError_t cudaGetDevice(int* device) {
  *device = host::current_device;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= host::kDevices) return cudaErrorInvalidDevice;
  host::current_device = device;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device) {
  if (device < 0 || device >= host::kDevices) return cudaErrorInvalidDevice;
  *value = which == cudaDevAttrMultiProcessorCount      ? host::device.processors
           : which == cudaDevAttrComputeCapabilityMajor ? host::device.major
           : which == cudaDevAttrComputeCapabilityMinor ? host::device.minor
                                                        : static_cast<int>(host::kSharedBytes);
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  if (bytes < 0 || bytes > static_cast<int>(host::kSharedBytes)) return cudaErrorInvalidValue;
  host::dynamic_shared[kernel] = bytes;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  memset(memory, value, bytes);
  return cudaSuccess;
}

// Runs the kernel at once; a Failure is thrown.
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... args) {
  constexpr size_t kUnasked = 48 << 10;
  const unsigned cluster = config->numAttrs ? config->attrs->val.clusterDim.x : 1;
  const size_t allowed = host::dynamic_shared[reinterpret_cast<const void*>(kernel)];
  if (config->blockDim.x < 1 || config->blockDim.x > 1024 || config->gridDim.x % cluster ||
      config->dynamicSmemBytes > max(kUnasked, allowed))
    return cudaErrorInvalidConfiguration;
  host::run({config->gridDim.x, config->blockDim.x, cluster, config->dynamicSmemBytes,
             host::current_device, config->stream},
            [&] { kernel(static_cast<Parameters>(args)...); });
  return cudaSuccess;
}
