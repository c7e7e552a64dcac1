// Kernels on the caller's device and stream, and CUDA's errors as exceptions that name the call.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace stf {

struct Size {
  const char* name;
  int64_t value;
};

struct Call {  // what an error says: the name of what was called, and its sizes
  const char* name;
  Size sizes[5];  // fewer, if the rest has no name
};

[[noreturn]] inline void fail(const Call& call, const std::string& reason) {
  std::string text = call.name;
  for (const Size& size : call.sizes)
    if (size.name) text += std::string(" ") + size.name + "=" + std::to_string(size.value);
  throw std::runtime_error(text + ": " + reason);
}

inline void check(cudaError_t status, const Call& call) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the next to ask would be told of this one
  fail(call, std::string(cudaGetErrorName(status)) + ", " + cudaGetErrorString(status));
}

inline int attribute(cudaDeviceAttr which, int device, const Call& call) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), call);
  return value;
}

class DeviceGuard {  // makes a device the current one, for as long as the guard lives
 public:
  DeviceGuard(int device, const Call& call) {
    check(cudaGetDevice(&previous_), call);
    check(cudaSetDevice(device), call);
  }
  ~DeviceGuard() { cudaSetDevice(previous_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
};

struct Grid {
  int64_t blocks;
  unsigned threads;      // of a block
  size_t shared = 0;     // dynamic shared memory of a block, bytes
  unsigned cluster = 1;  // blocks of a cluster
};

// Starts `kernel(args...)` on a stream of the current device.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Call& call, const Grid& grid, void* stream,
            const Arguments&... args) {
  constexpr int64_t most = 0x7fffffff;
  constexpr size_t unasked = 48 << 10;  // bytes of shared memory that any kernel may have
  if (grid.blocks < 1 || grid.blocks > most)
    fail(call, "blocks must be from 1 to 2147483647, got " + std::to_string(grid.blocks));
  if (grid.shared > unasked)
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(grid.shared)),
          call);
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeClusterDimension;
  together.val.clusterDim.x = grid.cluster;
  together.val.clusterDim.y = together.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.shared;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &together;
  config.numAttrs = grid.cluster > 1;
  check(cudaLaunchKernelEx(&config, kernel, Parameters(args)...), call);
}

}  // namespace stf
