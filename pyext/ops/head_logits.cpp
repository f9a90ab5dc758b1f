// speedrun::head_*_out on CUDA tensors. Schemas: python/speedrun/ops/head_logits.py.
#include "kernels/head_logits.h"

#include "torch_utils.h"

namespace speedrun {
namespace {

using torch::headeronly::ScalarType;

// Reads tensors of one operator into parameters: each contiguous, of the type and size named, on
// one device.
class Reader {
 public:
  Reader(const char* op, const Tensor& first) : op_(op) {
    check_cuda(first, op, "the first tensor");
    device_ = first.get_device_index();
  }
  template <typename T>
  void operator()(T*& data, const Tensor& tensor, ScalarType type, int64_t numel,
                  const char* name) const {
    data = static_cast<T*>(data_of(tensor, type, numel, device_, op_, name));
  }
  int64_t size(const Tensor& tensor, int64_t dim, const char* name) const {
    STD_TORCH_CHECK(tensor.dim() == 2, op_, ": ", name, " must be a matrix");
    return tensor.size(dim);
  }
  template <typename Params>
  void launch(cudaError_t (*launcher)(const Params&, cudaStream_t), const Params& params) const {
    const torch::stable::accelerator::DeviceGuard guard(device_);
    check_launch(launcher(params, current_stream(device_)), op_);
  }

 private:
  const char* op_;
  int32_t device_;
};

Softcapped softcap_of(double a, double b, double c) {
  return {static_cast<float>(a), static_cast<float>(b), static_cast<float>(c)};
}

// The product's scales and results, which the kernel behind it takes too; p has its sizes.
template <typename Params>
void read_logits(const Reader& read, Params& p, const Tensor& x_scale, const Tensor& w_scale,
                 const Tensor& sums, const Tensor& g, const Tensor& g_t) {
  const int64_t num_sums = (p.cols + kHeadColumns - 1) / kHeadColumns * p.rows;
  read(p.x_scale, x_scale, ScalarType::Float, 1, "x_scale");
  read(p.w_scale, w_scale, ScalarType::Float, 1, "w_scale");
  read(p.sums, sums, ScalarType::Float, num_sums, "sums");
  read(p.g, g, ScalarType::Float8_e5m2, p.rows * p.cols, "g");
  read(p.g_t, g_t, ScalarType::Float8_e5m2, p.rows * p.cols, "g_t");
}

void head_logits_out(const Tensor& x, const Tensor& w, const Tensor& x_scale, const Tensor& w_scale,
                     double a, double b, double c, Tensor sums, Tensor g, Tensor g_t) {
  const Reader read("head_logits_out", x);
  HeadLogitsParams p{};
  p.rows = read.size(x, 0, "x");
  p.dim = read.size(x, 1, "x");
  p.cols = read.size(w, 0, "w");
  read(p.x, x, ScalarType::Float8_e4m3fn, p.rows * p.dim, "x");
  read(p.w, w, ScalarType::Float8_e4m3fn, p.cols * p.dim, "w");
  read_logits(read, p, x_scale, w_scale, sums, g, g_t);
  p.softcap = softcap_of(a, b, c);
  read.launch(launch_head_logits, p);
}

void head_target_terms_out(const Tensor& sums, Tensor g, Tensor g_t, const Tensor& x,
                           const Tensor& w, const Tensor& x_f8, const Tensor& w_f8,
                           const Tensor& x_scale, const Tensor& w_scale, const Tensor& targets,
                           const Tensor& weights, double a, double b, double c, Tensor loss,
                           Tensor rows, Tensor sides) {
  const Reader read("head_target_terms_out", sums);
  HeadTargetTermsParams p{};
  p.rows = read.size(x, 0, "x");
  p.dim = read.size(x, 1, "x");
  p.cols = read.size(w, 0, "w");
  p.num_targets = read.size(targets, 1, "targets");
  read_logits(read, p, x_scale, w_scale, sums, g, g_t);
  read(p.x, x, ScalarType::BFloat16, p.rows * p.dim, "x");
  read(p.w, w, ScalarType::BFloat16, p.cols * p.dim, "w");
  read(p.x_f8, x_f8, ScalarType::Float8_e4m3fn, p.rows * p.dim, "x_f8");
  read(p.w_f8, w_f8, ScalarType::Float8_e4m3fn, p.cols * p.dim, "w_f8");
  read(p.targets, targets, ScalarType::Long, p.rows * p.num_targets, "targets");
  read(p.weights, weights, ScalarType::Float, p.num_targets, "weights");
  read(p.loss, loss, ScalarType::Float, p.rows, "loss");
  read(p.factors, rows, ScalarType::Float, p.rows, "rows");
  read(p.sides, sides, ScalarType::Float, p.rows * p.num_targets, "sides");
  p.softcap = softcap_of(a, b, c);
  read.launch(launch_head_target_terms, p);
}

void head_add_target_rows_out(const Tensor& w, const Tensor& targets, const Tensor& sides,
                              Tensor dx) {
  const Reader read("head_add_target_rows_out", w);
  HeadTargetRowsParams p{};
  p.rows = read.size(dx, 0, "dx");
  p.dim = read.size(dx, 1, "dx");
  p.cols = read.size(w, 0, "w");
  p.num_targets = read.size(targets, 1, "targets");
  read(p.w, w, ScalarType::BFloat16, p.cols * p.dim, "w");
  read(p.targets, targets, ScalarType::Long, p.rows * p.num_targets, "targets");
  read(p.sides, sides, ScalarType::Float, p.rows * p.num_targets, "sides");
  read(p.dx, dx, ScalarType::BFloat16, p.rows * p.dim, "dx");
  read.launch(launch_head_add_target_rows, p);
}

void head_add_target_columns_out(const Tensor& x, const Tensor& keys, const Tensor& order,
                                 const Tensor& sides, Tensor dw) {
  const Reader read("head_add_target_columns_out", x);
  HeadTargetColumnsParams p{};
  p.rows = read.size(x, 0, "x");
  p.dim = read.size(x, 1, "x");
  p.cols = read.size(dw, 1, "dw");
  p.num_targets = read.size(sides, 1, "sides");
  read(p.x, x, ScalarType::BFloat16, p.rows * p.dim, "x");
  read(p.keys, keys, ScalarType::Int, p.rows * p.num_targets, "keys");
  read(p.order, order, ScalarType::Long, p.rows * p.num_targets, "order");
  read(p.sides, sides, ScalarType::Float, p.rows * p.num_targets, "sides");
  read(p.dw, dw, ScalarType::Float, p.dim * p.cols, "dw");
  read.launch(launch_head_add_target_columns, p);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(speedrun, CUDA, m) {
  m.impl("head_logits_out", TORCH_BOX(&head_logits_out));
  m.impl("head_target_terms_out", TORCH_BOX(&head_target_terms_out));
  m.impl("head_add_target_rows_out", TORCH_BOX(&head_add_target_rows_out));
  m.impl("head_add_target_columns_out", TORCH_BOX(&head_add_target_columns_out));
}

}  // namespace speedrun
