// Persistent, warp-specialised GEMMs for sm_90a, put together from CUTLASS's parts: TMA in and out,
// wgmma, clusters. D = epilogue(A · Bᵀ) with A (m, k), B (n, k), D (m, n), all but the transposed
// copies row-major; sums in fp32.
#pragma once

// CUTLASS's reduction nodes would zero their outputs through a driver function we don't link.
#define CUTLASS_SKIP_REDUCTION_INIT

#include <cuda_runtime.h>
#include <cutlass/cutlass.h>
#include <cutlass/epilogue/thread/activation.h>
#include <cutlass/functional.h>

#include <climits>
#include <cmath>
#include <cstdint>
#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <type_traits>

#include "common/dtype.h"

namespace speedrun::sm90 {

// TMA's reduce-add, issued by one thread. The epilogue lets all 32 threads of a warp issue what it
// stores: ptxas makes one instruction of 32 stores, but repeats an add 32 times. It is always the
// same thread of the warp, so the warp's commits and waits count its adds.
struct AddOnce {};

}  // namespace speedrun::sm90

template <class Bits, class AuxParams>
struct cute::Copy_Traits<speedrun::sm90::AddOnce, Bits, AuxParams>
    : cute::Copy_Traits<cute::SM90_TMA_REDUCE_ADD, Bits, AuxParams> {
  using Add = cute::Copy_Traits<cute::SM90_TMA_REDUCE_ADD, Bits, AuxParams>;

  template <class Source, class SourceLayout, class Target, class TargetLayout>
  CUTE_HOST_DEVICE friend constexpr void copy_unpack(
      const Copy_Traits& traits, const cute::Tensor<Source, SourceLayout>& source,
      cute::Tensor<Target, TargetLayout>& target) {
    if (cute::elect_one_sync()) copy_unpack(static_cast<const Add&>(traits), source, target);
  }
};

namespace speedrun::sm90 {

namespace collective = cutlass::epilogue::collective;
namespace fusion = cutlass::epilogue::fusion;
using cute::_0;
using cute::_1;
using cute::Int;
using cutlass::layout::ColumnMajor;
using cutlass::layout::RowMajor;

template <DType kType>
struct ElementOf;
template <>
struct ElementOf<DType::kFloat8E4M3> {
  using Type = cutlass::float_e4m3_t;
};
template <>
struct ElementOf<DType::kFloat8E5M2> {
  using Type = cutlass::float_e5m2_t;
};
template <>
struct ElementOf<DType::kFloat16> {
  using Type = cutlass::half_t;
};
template <>
struct ElementOf<DType::kBFloat16> {
  using Type = cutlass::bfloat16_t;
};
template <>
struct ElementOf<DType::kFloat32> {
  using Type = float;
};
template <DType kType>
using Element = typename ElementOf<kType>::Type;

// ---- Epilogue nodes --------------------------------------------------------------------------

constexpr auto kNearestEven = cutlass::FloatRoundStyle::round_to_nearest;

// f(x, ..) element by element, in fp32; `Out` is what it is rounded to.
template <template <class> class Function, class Out, class... Inputs>
using Apply = fusion::Sm90EVT<fusion::Sm90Compute<Function, Out, float, kNearestEven>, Inputs...>;

// Function<Array> for functions written for one element.
template <template <class> class Function, class T, int kSize>
struct Elementwise {
  using Values = cutlass::Array<T, kSize>;
  template <class... Inputs>
  CUTLASS_HOST_DEVICE Values operator()(const Inputs&... inputs) const {
    Values result;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kSize; ++i) result[i] = Function<T>{}(inputs[i]...);
    return result;
  }
};

// relu(x)². NaN stays NaN.
template <class T>
struct ReluSquared {
  CUTLASS_HOST_DEVICE T operator()(T x) const {
    const T positive = cutlass::maximum<T, true>{}(x, T(0));
    return positive * positive;
  }
};
template <class T, int kSize>
struct ReluSquared<cutlass::Array<T, kSize>> : Elementwise<ReluSquared, T, kSize> {};

// √x for x >= 0 in one instruction, to about 1 ulp; subnormals count as 0.
CUTLASS_HOST_DEVICE float square_root(float x) {
#ifdef __CUDA_ARCH__
  float root;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(x));
  return root;
#else
  return std::sqrt(x);
#endif
}

// 2 · x · √post: times the derivative of relu² at the point where it is `post`.
template <class T>
struct TimesRelu2Slope {
  CUTLASS_HOST_DEVICE T operator()(T x, T post) const { return T(2) * x * square_root(post); }
};
template <class T, int kSize>
struct TimesRelu2Slope<cutlass::Array<T, kSize>> : Elementwise<TimesRelu2Slope, T, kSize> {};

// One number from device memory; the product of two; 1 / one.
using Scalar = fusion::Sm90ScalarBroadcast<float>;
using ScalarProduct = fusion::Sm90ScalarBroadcast<float, cute::Stride<_0, _0, _0>, 2>;
using Reciprocal =
    fusion::Sm90ScalarBroadcast<float, cute::Stride<_0, _0, _0>, 2, cutlass::divides>;

inline Scalar::Arguments scalar(const float* x) { return {{1.f}, {x}}; }
inline ScalarProduct::Arguments scalar_product(const float* x, const float* y) {
  return {{1.f, 1.f}, {x, y}};
}
inline Reciprocal::Arguments reciprocal(const float* x) { return {{1.f, 1.f}, {nullptr, x}}; }

// *ptr_scalar = max(*ptr_scalar, |x|) over all x, NaN if one is; null: nothing. What lies outside
// the output needn't be left out: it is a sum of zeros (or NaN where a scale is).
struct AbsMax : fusion::Sm90ScalarReduction<cutlass::maximum_with_nan_propagation,
                                            cutlass::atomic_maximum, float, float, kNearestEven> {
  using Base = fusion::Sm90ScalarReduction<cutlass::maximum_with_nan_propagation,
                                           cutlass::atomic_maximum, float, float, kNearestEven>;
  using Base::Base;

  struct ConsumerStoreCallbacks : fusion::EmptyConsumerStoreCallbacks {
    float* target;
    float largest = 0.f;
    CUTLASS_DEVICE explicit ConsumerStoreCallbacks(float* target) : target(target) {}

    template <class Accumulator, class Input, int kSize>
    CUTLASS_DEVICE auto visit(const cutlass::Array<Accumulator, kSize>&, int, int, int,
                              const cutlass::Array<Input, kSize>& input) {
      const auto values =
          cutlass::NumericArrayConverter<float, Input, kSize, kNearestEven>{}(input);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kSize; ++i) {
        largest = cutlass::maximum<float, true>{}(largest, fabsf(values[i]));
      }
      return input;
    }

    // At the end of each tile. Numbers >= 0 and NaN are ordered as their bits are.
    CUTLASS_DEVICE void end() {
      if (target == nullptr) return;
      const unsigned bits = __reduce_max_sync(0xffffffff, __float_as_uint(largest));
      if (cutlass::canonical_lane_idx() == 0) {
        atomicMax(reinterpret_cast<unsigned*>(target), bits);
      }
    }
  };

  template <bool kReferenceSource, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(
      const fusion::detail::ConsumerStoreArgs<Args...>&) {
    return ConsumerStoreCallbacks(params.ptr_scalar);
  }
};

// ---- GEMMs -----------------------------------------------------------------------------------

// One thread block's share: kM x kN outputs in steps of 128 bytes of K. kClusterM thread blocks,
// one below the other, share what they load of B. C (void: none) and D, the types of the epilogue's
// input and output matrices, decide how it cuts the tile.
template <int kM, int kN, int kClusterM, bool kPingpong, class C, class D>
struct Shape {
  template <class A>
  using Tile = cute::Shape<Int<kM>, Int<kN>, Int<128 / sizeof(A)>>;
  using Cluster = cute::Shape<Int<kClusterM>, _1, _1>;
  static constexpr bool kIsPingpong = kPingpong;
  using ElementC = C;
  using ElementD = D;
  using Schedule = cute::conditional_t<kPingpong, cutlass::epilogue::TmaWarpSpecialized,
                                       cutlass::epilogue::TmaWarpSpecializedCooperative>;
  using Descriptor =
      collective::detail::EpilogueDescriptor<Tile<D>, collective::EpilogueTileAuto, C, D, Schedule>;

  // Node that also stores its input, rounded to T: row-major, or (ColumnMajor) transposed.
  template <class T, class Layout>
  struct Store {
    using Aux = collective::detail::AuxStoreDescriptor<Descriptor, Layout, T>;
    using Node = fusion::Sm90AuxStore<Aux::Stages, typename Aux::EpilogueTile, T, kNearestEven,
                                      typename Aux::Stride, typename Aux::SmemLayoutAtom,
                                      typename Aux::CopyOpR2S>;
  };
  template <class T, class Layout, class Input>
  using AlsoStore = fusion::Sm90EVT<typename Store<T, Layout>::Node, Input>;
};

// The same epilogue, adding to D in memory instead of overwriting it: without reading it first.
template <class Epilogue>
struct Adding;
template <class Policy, class Tile, class Subtile, class C, class StrideC, class D, class StrideD,
          class Fusion, class Load, class LayoutC, class LoadC, class Store, class LayoutD,
          class StoreD, class Atom, class Move>
struct Adding<
    collective::CollectiveEpilogue<Policy, Tile, Subtile, C, StrideC, D, StrideD, Fusion, Load,
                                   LayoutC, LoadC, Store, LayoutD, StoreD, Atom, Move>> {
  using type =
      collective::CollectiveEpilogue<Policy, Tile, Subtile, C, StrideC, D, StrideD, Fusion, Load,
                                     LayoutC, LoadC, AddOnce, LayoutD, StoreD, Atom, Move>;
};

// kFast: FP8 only, sums left in the tensor cores. kAdd: D += instead of D =, and D has no batch
// dimension: the whole batch is added to one matrix. Layouts of A and Bᵀ: ColumnMajor and RowMajor
// where they are stored with K first, which 16-bit types may be. Scheduler: which tiles are
// computed, and in which order.
template <class Shape, class A, class B, class Fusion, bool kFast, bool kAdd = false,
          class LayoutA = RowMajor, class LayoutB = ColumnMajor,
          class Scheduler = cutlass::gemm::PersistentScheduler>
class Gemm {
  using Tile = typename Shape::template Tile<A>;
  using C = typename Shape::ElementC;
  using D = typename Shape::ElementD;
  using LayoutD = cute::conditional_t<kAdd, cute::Stride<int64_t, _1, _0>, RowMajor>;
  template <class T>
  static constexpr int kAlignment = 16 / sizeof(cute::conditional_t<cute::is_void_v<T>, D, T>);

  using Storing = typename collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, typename Shape::Cluster,
      collective::EpilogueTileAuto, float, float, C, RowMajor, kAlignment<C>, D, LayoutD,
      kAlignment<D>, typename Shape::Schedule, Fusion>::CollectiveOp;
  using Epilogue =
      typename cute::conditional_t<kAdd, Adding<Storing>, std::type_identity<Storing>>::type;

  using Schedule = cute::conditional_t<
      Shape::kIsPingpong,
      cute::conditional_t<kFast, cutlass::gemm::KernelTmaWarpSpecializedPingpongFP8FastAccum,
                          cutlass::gemm::KernelTmaWarpSpecializedPingpong>,
      cute::conditional_t<kFast, cutlass::gemm::KernelTmaWarpSpecializedCooperativeFP8FastAccum,
                          cutlass::gemm::KernelTmaWarpSpecializedCooperative>>;
  // As many steps of K as fit in shared memory beside the epilogue's buffers.
  using Stages = cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
      sizeof(typename Epilogue::SharedStorage))>;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, A, LayoutA, kAlignment<A>, B, LayoutB,
      kAlignment<B>, float, Tile, typename Shape::Cluster, Stages, Schedule>::CollectiveOp;

 public:
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop,
                                                      Epilogue, Scheduler>;
};

// What a kernel's name tells profilers and benchmarks/static_check.py besides what it computes:
// its tile, the steps of K in flight, bytes of shared memory.
template <class Kernel>
constexpr int kTileM = cute::size<0>(typename Kernel::TileShape{});
template <class Kernel>
constexpr int kTileN = cute::size<1>(typename Kernel::TileShape{});
template <class Kernel>
constexpr int kStages = Kernel::CollectiveMainloop::DispatchPolicy::Stages;
template <class Kernel>
constexpr int kSharedBytes = Kernel::SharedStorageSize;

// ---- Launch ----------------------------------------------------------------------------------

// A matrix or a batch of them; strides count elements, that of the last dimension is 1.
struct Matrix {
  const void* data;
  int64_t row_stride, batch_stride;
};

// Whether TMA can take it: addresses and strides are multiples of 16 bytes.
inline bool is_aligned(const Matrix& matrix, int element_bytes) {
  const auto address = static_cast<int64_t>(reinterpret_cast<uintptr_t>(matrix.data));
  return ((address | matrix.row_stride * element_bytes | matrix.batch_stride * element_bytes) &
          15) == 0;
}

// As CuTe's (m or n, k or n, batch); the stride that is 1 is the one that the type says.
template <class Stride>
Stride stride_of(const Matrix& matrix) {
  if constexpr (cute::is_static_v<cute::tuple_element_t<0, Stride>>) {
    return cute::make_stride(_1{}, matrix.row_stride, matrix.batch_stride);
  } else if constexpr (cute::is_static_v<cute::tuple_element_t<2, Stride>>) {
    return cute::make_stride(matrix.row_stride, _1{}, _0{});  // no batch
  } else {
    return cute::make_stride(matrix.row_stride, _1{}, matrix.batch_stride);
  }
}

struct Problem {
  int64_t m, n, k, batch;
  Matrix a, b, c, d;  // c.data may be null
  int strip;          // clusters that a strip of tiles is high: 1, 2, 4 or 8
};

inline cudaError_t count_sms(int* num_sms) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  return cudaDeviceGetAttribute(num_sms, cudaDevAttrMultiProcessorCount, device);
}

template <class Kernel>
using FusionArguments = decltype(Kernel::EpilogueArguments::thread);

// Launches `kernel`, a __global__ function that runs Kernel on its parameters. No size is 0.
// cudaErrorInvalidValue: a size above 2^31 - 1, or a matrix that TMA can't take.
template <class Kernel>
cudaError_t launch(void (*kernel)(typename Kernel::Params), const Problem& p,
                   const FusionArguments<Kernel>& fusion, int num_sms, cudaStream_t stream) {
  using D = typename Kernel::ElementD;
  for (const int64_t size : {p.m, p.n, p.k, p.batch}) {
    if (size > INT_MAX) return cudaErrorInvalidValue;
  }
  if (!is_aligned(p.a, sizeof(typename Kernel::ElementA)) ||
      !is_aligned(p.b, sizeof(typename Kernel::ElementB)) || !is_aligned(p.d, sizeof(D))) {
    return cudaErrorInvalidValue;
  }

  typename Kernel::Arguments arguments{};
  arguments.mode = cutlass::gemm::GemmUniversalMode::kGemm;
  arguments.problem_shape = {static_cast<int>(p.m), static_cast<int>(p.n), static_cast<int>(p.k),
                             static_cast<int>(p.batch)};
  arguments.mainloop.ptr_A = static_cast<const typename Kernel::ElementA*>(p.a.data);
  arguments.mainloop.dA = stride_of<decltype(arguments.mainloop.dA)>(p.a);
  arguments.mainloop.ptr_B = static_cast<const typename Kernel::ElementB*>(p.b.data);
  arguments.mainloop.dB = stride_of<decltype(arguments.mainloop.dB)>(p.b);
  arguments.epilogue.thread = fusion;
  if constexpr (!cute::is_void_v<typename Kernel::ElementC>) {
    if (!is_aligned(p.c, sizeof(typename Kernel::ElementC))) return cudaErrorInvalidValue;
    arguments.epilogue.ptr_C = static_cast<const typename Kernel::ElementC*>(p.c.data);
    arguments.epilogue.dC = stride_of<decltype(arguments.epilogue.dC)>(p.c);
  }
  arguments.epilogue.ptr_D = static_cast<const D*>(p.d.data);
  arguments.epilogue.dD = stride_of<decltype(arguments.epilogue.dD)>(p.d);
  arguments.hw_info.sm_count = num_sms;
  arguments.scheduler.max_swizzle_size = p.strip;
  const typename Kernel::Params params = Kernel::to_underlying_arguments(arguments, nullptr);

  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes<Kernel>);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = cute::size<0>(typename Kernel::ClusterShape{});
  cluster.val.clusterDim.y = cute::size<1>(typename Kernel::ClusterShape{});
  cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = Kernel::get_grid_shape(params);
  config.blockDim = Kernel::get_block_shape();
  config.dynamicSmemBytes = kSharedBytes<Kernel>;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, params);
}

}  // namespace speedrun::sm90
