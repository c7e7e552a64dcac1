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

std::vector<const CpuStages*> cpu_stages() {
  std::vector<const CpuStages*> found;
#ifdef STF_X86
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("bmi2");
  if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    found.push_back(&avx512::stages);
  if (has_avx2) found.push_back(&avx2::stages);
#endif
  found.push_back(&baseline::stages);
  return found;
}

}  // namespace stf
