#include <cuda_runtime.h>

#include <memory>
#include <stdexcept>
#include <string>

#include "arithmetic.h"
#include "cuda_check.h"

namespace stf {
namespace {

void check(cudaError_t status, const std::string& call) {
  if (status != cudaSuccess) throw std::runtime_error(call + ": " + cudaGetErrorString(status));
}

struct Free {
  void operator()(double* memory) const { cudaFree(memory); }
};

// Input   e [count]
// Output  p [count]
// Math    p = 2^e by the polynomial of MATH.md, stage 3
// Presumes -63 <= e <= 0
// Tiles   one value a thread
__global__ void exp2_kernel(const double* e, double* p, int64_t count) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < count) p[i] = exp2_spec(e[i]);
}

}  // namespace

void cuda_exp2(const double* e, double* p, int64_t count, int device) {
  const size_t bytes = count * sizeof(double);
  int previous = 0;
  check(cudaGetDevice(&previous), "cudaGetDevice");
  check(cudaSetDevice(device), "cudaSetDevice");
  void* memory = nullptr;
  check(cudaMalloc(&memory, 2 * bytes), "cudaMalloc of " + std::to_string(2 * bytes) + " bytes");
  const std::unique_ptr<double, Free> in(static_cast<double*>(memory));
  double* out = in.get() + count;
  check(cudaMemcpy(in.get(), e, bytes, cudaMemcpyHostToDevice), "cudaMemcpy to the device");
  exp2_kernel<<<static_cast<unsigned>((count + 255) / 256), 256>>>(in.get(), out, count);
  check(cudaGetLastError(), "exp2_kernel of " + std::to_string(count) + " values");
  check(cudaMemcpy(p, out, bytes, cudaMemcpyDeviceToHost), "cudaMemcpy to the host");
  check(cudaSetDevice(previous), "cudaSetDevice");
}

}  // namespace stf
