// fp32 operations that the compiler may not contract, so that each is rounded once, as in the
// references; also on the host, where tests run them.
#pragma once

#include <cuda_runtime.h>

#include <cmath>

#include "common/int_math.h"

namespace speedrun {

HOST_DEVICE inline float add(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

HOST_DEVICE inline float multiply(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  const volatile float product = a * b;  // or GCC makes it part of a sum
  return product;
#endif
}

HOST_DEVICE inline float divide(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}

HOST_DEVICE inline float square_root(float a) {
#ifdef __CUDA_ARCH__
  return __fsqrt_rn(a);
#else
  return std::sqrt(a);
#endif
}

}  // namespace speedrun
