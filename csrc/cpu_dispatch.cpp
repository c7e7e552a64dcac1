#include "cpu_stages.h"

namespace stf {

namespace baseline {
extern const CpuStages stages;
}
#ifdef STF_X86
namespace avx2 {
extern const CpuStages stages;
}
namespace avx512 {
extern const CpuStages stages;
}
#endif

const CpuStages& cpu_stages() {
#ifdef STF_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return avx512::stages;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("bmi2"))
    return avx2::stages;
#endif
  return baseline::stages;
}

}  // namespace stf
