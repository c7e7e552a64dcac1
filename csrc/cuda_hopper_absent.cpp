// In the place of cuda_hopper.cu where sm_90a is not among the architectures built for.
#include <stdexcept>

#include "cuda_stages.h"

namespace stf::cuda::hopper {
namespace {

[[noreturn]] void refuse() {
  throw std::runtime_error("the kernels for sm_90a are not built: CUDAARCHS left 90a out");
}

}  // namespace

bool built() { return false; }
bool takes_logits(Digits, Matrix) { return false; }
bool takes_dense(Survivors, int64_t, int, Matrix) { return false; }
void logits(Digits, Matrix, LogitCall, Place) { refuse(); }
void multiply_dense(Survivors, int64_t, int, Matrix, int64_t*, Place) { refuse(); }

}  // namespace stf::cuda::hopper
