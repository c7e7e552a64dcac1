// The driver's names on the host, as far as csrc/ uses them: tensor maps.
#pragma once
#include <cstring>

#include "cuda_runtime.h"

using CUresult = int;
using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;
constexpr CUresult CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1;

enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_UINT8 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_128B = 3 };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3 };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };

struct CUtensorMap {
  alignas(64) uint64_t opaque[16];
};

namespace host {

struct TensorMap {  // what a CUtensorMap holds here: three dimensions, the first without gaps
  const uint8_t* tensor;
  uint64_t sizes[3];
  uint64_t strides[3];  // bytes
  uint32_t box[3];
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap), "it has to fit");

// The limits of CUDA's documentation; `strides` as a nested layout has them.
inline bool valid(const TensorMap& map) {
  bool good = reinterpret_cast<uintptr_t>(map.tensor) % 16 == 0 && map.box[0] == 128;
  for (int i = 0; i < 3; ++i) {
    good = good && map.sizes[i] >= 1 && map.sizes[i] <= uint64_t{1} << 32;
    good = good && map.box[i] >= 1 && map.box[i] <= 256;
  }
  for (int i = 1; i < 3; ++i) {
    good = good && map.strides[i] % 16 == 0 && map.strides[i] < uint64_t{1} << 40;
    good = good && map.strides[i] >= map.sizes[i - 1] * map.strides[i - 1];
    good = good && map.strides[i] % map.strides[i - 1] == 0;
  }
  return good;
}

}  // namespace host

inline CUresult cuTensorMapEncodeTiled(CUtensorMap* out, CUtensorMapDataType, cuuint32_t rank,
                                       void* tensor, const cuuint64_t* sizes,
                                       const cuuint64_t* strides, const cuuint32_t* box,
                                       const cuuint32_t* steps, CUtensorMapInterleave,
                                       CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                                       CUtensorMapFloatOOBfill) {
  if (rank != 3 || swizzle != CU_TENSOR_MAP_SWIZZLE_128B) return CUDA_ERROR_INVALID_VALUE;
  host::TensorMap map{static_cast<const uint8_t*>(tensor),
                      {sizes[0], sizes[1], sizes[2]},
                      {1, strides[0], strides[1]},
                      {box[0], box[1], box[2]}};
  if (!host::valid(map) || steps[0] != 1 || steps[1] != 1 || steps[2] != 1)
    return CUDA_ERROR_INVALID_VALUE;
  memcpy(out, &map, sizeof map);
  return CUDA_SUCCESS;
}

constexpr unsigned long long cudaEnableDefault = 0;
enum cudaDriverEntryPointQueryResult {
  cudaDriverEntryPointSuccess,
  cudaDriverEntryPointSymbolNotFound
};

inline cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                                    unsigned long long,
                                                    cudaDriverEntryPointQueryResult* result) {
  const bool known = strcmp(name, "cuTensorMapEncodeTiled") == 0;
  *function = known ? reinterpret_cast<void*>(&cuTensorMapEncodeTiled) : nullptr;
  *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
