// The CUDA runtime's place taken by functions that launch nothing: they refuse what a driver would,
// tensor maps and launches that no Hopper GPU takes, and keep what tests look at.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <vector>

#include "tests/check.h"

namespace speedrun {
namespace {

using Sizes = std::vector<uint64_t>;
constexpr uint64_t kSms = 132, kMaxShared = 227 << 10;

struct TensorMap {
  Sizes sizes, strides;  // elements; bytes, without that of the innermost dimension, the first
};
std::map<const void*, TensorMap> maps;  // of the launch at hand, by address
int launches = 0, zeroed = 0, mirrors = 0;
size_t cleared_bytes = 0;                     // of polar_chain's counters
int blocks_per_sm = 1;                        // what the fake runtime says of occupancy
int ptx_version = 90;                         // and of the code at hand
uint64_t blocks = 0;                          // of the last launch
size_t cluster_bytes = 0;                     // of shared memory, of softcap_ce's last launch
int64_t plain_blocks = 0;                     // of the last that is no GEMM's
std::map<const void*, size_t> shared_limits;  // by kernel

uint32_t bytes_of(CUtensorMapDataType type) {
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8:  // fp8
      return 1;
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:  // bf16 that is only loaded
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
      return 2;
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32:
      return 4;
    default:
      CHECK(!"a type that no matrix here has");
  }
}

uint32_t widest_row(CUtensorMapSwizzle swizzle) {
  switch (swizzle) {
    case CU_TENSOR_MAP_SWIZZLE_32B:
      return 32;
    case CU_TENSOR_MAP_SWIZZLE_64B:
      return 64;
    case CU_TENSOR_MAP_SWIZZLE_128B:
      return 128;
    default:
      return 1024;
  }
}

// With what the driver's documentation demands of cuTensorMapEncodeTiled.
CUresult fake_encode(CUtensorMap*, CUtensorMapDataType type, cuuint32_t rank, void* address,
                     const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                     const cuuint32_t* steps, CUtensorMapInterleave interleave,
                     CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  CHECK(interleave == CU_TENSOR_MAP_INTERLEAVE_NONE && rank >= 1 && rank <= 5);
  CHECK(address != nullptr && reinterpret_cast<uintptr_t>(address) % 16 == 0);
  TensorMap& map = maps[address] = {};
  for (uint32_t i = 0; i < rank; ++i) {
    CHECK(sizes[i] >= 1 && sizes[i] <= uint64_t{1} << 32);
    CHECK(box[i] >= 1 && box[i] <= 256 && steps[i] == 1);
    map.sizes.push_back(sizes[i]);
    if (i == 0) continue;
    CHECK(strides[i - 1] % 16 == 0 && strides[i - 1] < uint64_t{1} << 40);
    map.strides.push_back(strides[i - 1]);
  }
  const uint32_t row_bytes = box[0] * bytes_of(type);
  CHECK(row_bytes % 16 == 0 && row_bytes <= widest_row(swizzle));
  return CUDA_SUCCESS;
}

cudaError_t fake_launch(const cudaLaunchConfig_t& config, const void* kernel) {
  if (config.numAttrs == 0) {  // what is no GEMM, such as sym_matmul's second one
    CHECK(config.gridDim.x >= 1 && config.gridDim.y >= 1 && config.gridDim.y <= 65535);
    plain_blocks = int64_t{config.gridDim.x} * config.gridDim.y;
    ++mirrors;
    return cudaSuccess;
  }
  blocks = uint64_t{config.gridDim.x} * config.gridDim.y * config.gridDim.z;
  if (config.blockDim.x == 512) {  // softcap_ce, a cluster for 16 rows
    const auto& cluster = config.attrs[0].val.clusterDim;
    CHECK(config.attrs[0].id == cudaLaunchAttributeClusterDimension && config.numAttrs == 1);
    CHECK(cluster.x == 8 && cluster.y == 1 && cluster.z == 1 && blocks % cluster.x == 0);
    CHECK(config.dynamicSmemBytes <= shared_limits[kernel]);
    cluster_bytes = config.dynamicSmemBytes;
    ++launches;
    return cudaSuccess;
  }
  CHECK(blocks >= 1 && blocks <= kSms);  // persistent
  CHECK(config.blockDim.x == 384 && config.blockDim.y == 1 && config.blockDim.z == 1);
  CHECK(config.dynamicSmemBytes <= kMaxShared);
  CHECK(config.dynamicSmemBytes <= shared_limits[kernel]);
  CHECK(config.numAttrs == 1);
  ++launches;
  if (config.attrs[0].id == cudaLaunchAttributeCooperative) {  // polar_chain
    CHECK(config.attrs[0].val.cooperative == 1);
    return cudaSuccess;
  }
  CHECK(config.attrs[0].id == cudaLaunchAttributeClusterDimension);
  const auto& cluster = config.attrs[0].val.clusterDim;
  CHECK(cluster.x * cluster.y * cluster.z <= 8);  // more would have to be allowed first
  CHECK(config.gridDim.x % cluster.x == 0 && config.gridDim.y % cluster.y == 0);
  CHECK(config.gridDim.z % cluster.z == 0);
  return cudaSuccess;
}

// Memory that nobody reads; where each operand begins.
char* at(int operand) { return reinterpret_cast<char*>((int64_t{operand} + 1) << 40); }
float* number(int operand) { return reinterpret_cast<float*>(at(operand)); }

void expect(const void* address, const Sizes& sizes, const Sizes& strides) {
  CHECK(maps.count(address) == 1);
  const TensorMap& map = maps[address];
  // Dimensions of size 1 may be left out.
  Sizes found = map.sizes;
  while (found.size() > sizes.size() && found.back() == 1) found.pop_back();
  CHECK(found == sizes);
  for (size_t i = 0; i + 1 < sizes.size(); ++i) CHECK(map.strides[i] == strides[i]);
}

void expect_launches(int count) {
  CHECK(launches == count);
  launches = zeroed = mirrors = 0;
  maps.clear();
}

enum { kA, kB, kC, kOut, kPost, kTransposed, kScale, kRowScale, kAmax };

}  // namespace
}  // namespace speedrun

extern "C" {
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin) {
    *value = static_cast<int>(speedrun::kMaxShared);
  } else {
    CHECK(attribute == cudaDevAttrMultiProcessorCount);
    *value = static_cast<int>(speedrun::kSms);
  }
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  attributes->ptxVersion = speedrun::ptx_version;
  attributes->sharedSizeBytes = 512;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  CHECK(attribute == cudaFuncAttributeMaxDynamicSharedMemorySize);
  speedrun::shared_limits[kernel] = value;
  return cudaSuccess;
}
cudaError_t cudaMemset2DAsync(void* target, size_t pitch, int value, size_t width, size_t,
                              cudaStream_t) {
  CHECK(target == speedrun::at(speedrun::kOut) && value == 0 && width <= pitch);
  ++speedrun::zeroed;
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* target, int value, size_t bytes, cudaStream_t) {
  CHECK(target == speedrun::at(speedrun::kB) && value == 0);
  speedrun::cleared_bytes = bytes;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* count, const void* kernel,
                                                                   int num_threads,
                                                                   size_t shared_bytes, unsigned) {
  CHECK(num_threads == 384 && shared_bytes <= speedrun::shared_limits[kernel]);
  *count = speedrun::blocks_per_sm;
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* status) {
  CHECK(std::strcmp(symbol, "cuTensorMapEncodeTiled") == 0);
  *function = reinterpret_cast<void*>(&speedrun::fake_encode);
  *status = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void**, size_t shared_bytes,
                             cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return speedrun::fake_launch(config, kernel);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void**) {
  return speedrun::fake_launch(*config, kernel);
}
}  // extern "C"
