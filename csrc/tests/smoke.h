// What the smoke programs of the GEMMs share.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <vector>

#include "common/cuda_check.h"

namespace speedrun {

// Device memory with the contents of a vector.
template <typename T>
class Device {
 public:
  explicit Device(const std::vector<T>& host) : size_(host.size()) {
    CUDA_CHECK(cudaMalloc(&data_, std::max<size_t>(size_ * sizeof(T), 1)));
    CUDA_CHECK(cudaMemcpy(data_, host.data(), size_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  ~Device() { cudaFree(data_); }
  Device(const Device&) = delete;
  T* get() const { return data_; }
  std::vector<T> read() const {
    std::vector<T> host(size_);
    CUDA_CHECK(cudaMemcpy(host.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost));
    return host;
  }

 private:
  T* data_ = nullptr;
  size_t size_;
};

inline uint32_t state = 1;
inline float uniform() {  // in [-1, 1)
  state = state * 1664525u + 1013904223u;
  return static_cast<float>(static_cast<int32_t>(state)) / 2147483648.f;
}

inline int failures = 0;

inline void report(const char* what, int64_t m, int64_t n, int64_t k, int64_t wrong) {
  std::printf("%-28s %5ld x %5ld x %5ld: %ld wrong\n", what, static_cast<long>(m),
              static_cast<long>(n), static_cast<long>(k), static_cast<long>(wrong));
  failures += wrong != 0;
}

// False for NaN.
inline bool is_close(double x, double expected, double relative, double absolute) {
  return std::abs(x - expected) <= relative * std::abs(expected) + absolute;
}

// Runs `run_all` on the host, and on the GPU where there is one; returns what main does.
inline int run_everywhere(const char* name, void (*run_all)(bool gpu)) {
  run_all(false);
  int num_devices = 0;
  if (cudaGetDeviceCount(&num_devices) == cudaSuccess && num_devices > 0) {
    run_all(true);
  } else {
    std::printf("%s on the GPU: not run, there is none\n", name);
  }
  return failures != 0;
}

// Runs `run_all` where there is a GPU of compute capability 9.0; returns what main does.
inline int run_on_hopper(const char* name, void (*run_all)()) {
  int num_devices = 0;
  cudaDeviceProp properties{};
  if (cudaGetDeviceCount(&num_devices) != cudaSuccess || num_devices == 0 ||
      cudaGetDeviceProperties(&properties, 0) != cudaSuccess || properties.major != 9) {
    std::printf("%s: not run, there is no GPU of compute capability 9.0\n", name);
    return 0;
  }
  run_all();
  return failures != 0;
}

}  // namespace speedrun
