// What every binding needs of torch's stable ABI: checks with readable messages, types, stream.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "common/dtype.h"

// torch built for CUDA has it, torch for the CPU has not: weak, so that _C can be imported (and its
// operators inspected) under both. The address is null under the latter.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                             void** ret_stream)
    __attribute__((weak));

namespace speedrun {

using torch::stable::Tensor;

inline void check_cuda(const Tensor& tensor, const char* op, const char* name) {
  STD_TORCH_CHECK(tensor.is_cuda(), op, ": ", name, " must be a CUDA tensor");
}

// Data of a contiguous CUDA tensor on `device` with so many elements of that type.
inline void* data_of(const Tensor& tensor, torch::headeronly::ScalarType type, int64_t numel,
                     int32_t device, const char* op, const char* name) {
  check_cuda(tensor, op, name);
  STD_TORCH_CHECK(
      tensor.is_contiguous() && tensor.numel() == numel && tensor.scalar_type() == type &&
          tensor.get_device_index() == device,
      op, ": ", name,
      " must be contiguous, of the expected type and on the first tensor's device, with ", numel,
      " elements");
  return tensor.mutable_data_ptr();
}

inline DType dtype_of(const Tensor& tensor, const char* op, const char* name) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Byte:
      return DType::kUInt8;
    case ScalarType::Char:
      return DType::kInt8;
    case ScalarType::Float8_e4m3fn:
      return DType::kFloat8E4M3;
    case ScalarType::Float8_e5m2:
      return DType::kFloat8E5M2;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Int:
      return DType::kInt32;
    case ScalarType::Float:
      return DType::kFloat32;
    default:
      STD_TORCH_CHECK(false, op, ": ", name, " has a type that no kernel takes");
  }
}

// torch's current stream on that device.
inline cudaStream_t current_stream(int32_t device_index) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                  "this torch was built without CUDA");
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream) == TORCH_SUCCESS,
                  "torch has no current stream on device ", device_index);
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(cudaError_t error, const char* op) {
  STD_TORCH_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(error));
}

}  // namespace speedrun
