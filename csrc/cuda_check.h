// What `python -m stf_kernels.env` asks of the CUDA part.
#pragma once
#include <cstdint>

namespace stf {

// Input   e [count] in host memory, -63 <= e <= 0
// Output  p [count] in host memory: 2^e as the device computes it, to be compared with exp2_spec
//         on the host bit for bit; throws std::runtime_error with CUDA's words
void cuda_exp2(const double* e, double* p, int64_t count, int device);

}  // namespace stf
