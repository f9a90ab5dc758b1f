// Element types of the tensors that kernels take.
#pragma once

namespace speedrun {

enum class DType {
  kUInt8,
  kInt8,
  kFloat8E4M3,
  kFloat8E5M2,
  kFloat16,
  kBFloat16,
  kInt32,
  kFloat32,
};

constexpr int element_bytes(DType dtype) {
  switch (dtype) {
    case DType::kUInt8:
    case DType::kInt8:
    case DType::kFloat8E4M3:
    case DType::kFloat8E5M2:
      return 1;
    case DType::kFloat16:
    case DType::kBFloat16:
      return 2;
    case DType::kInt32:
    case DType::kFloat32:
      return 4;
  }
  return 0;
}

}  // namespace speedrun
