// head_target_terms, head_add_target_rows, head_add_target_columns: launchers.
#include <climits>

#include "kernels/head_logits.cuh"
#include "kernels/head_logits_targets.cuh"

namespace speedrun {
namespace {

template <class Params>
bool is_valid(const Params& p) {
  return p.rows >= 0 && p.rows <= INT_MAX / kMaxHeadTargets && p.cols >= 0 && p.cols <= INT_MAX &&
         p.dim > 0 && p.dim <= INT_MAX && p.dim % 8 == 0 && p.num_targets >= 1 &&
         p.num_targets <= kMaxHeadTargets;
}

// A warp for each row.
unsigned blocks_for(int64_t rows) { return static_cast<unsigned>(ceil_div(rows, head::kWarps)); }

}  // namespace

cudaError_t launch_head_target_terms(const HeadTargetTermsParams& p, cudaStream_t stream) {
  if (!is_valid(p) || !head::is_valid(p.softcap)) return cudaErrorInvalidValue;
  if (p.rows == 0 || p.cols == 0) return cudaSuccess;
  head::target_terms_kernel<<<blocks_for(p.rows), head::kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

cudaError_t launch_head_add_target_rows(const HeadTargetRowsParams& p, cudaStream_t stream) {
  if (!is_valid(p)) return cudaErrorInvalidValue;
  if (p.rows == 0 || p.cols == 0) return cudaSuccess;
  head::add_target_rows_kernel<<<blocks_for(p.rows), head::kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

cudaError_t launch_head_add_target_columns(const HeadTargetColumnsParams& p, cudaStream_t stream) {
  if (!is_valid(p)) return cudaErrorInvalidValue;
  if (p.rows == 0 || p.cols == 0) return cudaSuccess;
  const dim3 blocks(static_cast<unsigned>(ceil_div(p.cols, head::kBlockColumns)), head::kDimParts);
  head::add_target_columns_kernel<<<blocks, head::kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace speedrun
