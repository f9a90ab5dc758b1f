// speedrun._host: the token loader over NumPy arrays. The wait happens without the GIL.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "data/loader.h"

namespace py = pybind11;

namespace speedrun {
namespace {

using ShapeTuple = std::tuple<int64_t, int64_t, int64_t, int64_t>;
using FormatTuple = std::tuple<std::string, int64_t, int64_t>;
using PositionTuple = std::tuple<int64_t, int64_t, int64_t>;

// How long a KeyboardInterrupt may wait.
constexpr std::chrono::milliseconds kWaitSlice{10};

std::unique_ptr<Loader> make_loader(std::vector<std::string> shards,
                                    const std::vector<ShapeTuple>& shapes,
                                    const FormatTuple& format, bool split, bool repeat,
                                    const PositionTuple& start, int rank, int world_size,
                                    int32_t bigram_table_rows, int32_t sign_table_rows,
                                    size_t prefetch_steps) {
  LoaderOptions options = {
      .shards = std::move(shards),
      .shapes = {},
      .format = std::make_from_tuple<DataFormat>(format),
      .long_documents = split ? LongDocuments::kSplit : LongDocuments::kCut,
      .repeat = repeat,
      .start = std::make_from_tuple<LoaderPosition>(start),
      .rank = rank,
      .world_size = world_size,
      .bigram_table_rows = bigram_table_rows,
      .sign_table_rows = sign_table_rows,
  };
  for (const auto& shape : shapes) {
    options.shapes.push_back(std::make_from_tuple<BatchShape>(shape));
  }
  return std::make_unique<Loader>(std::move(options), prefetch_steps);
}

// (inputs, targets, cu_seqlens, bigram_rows, sign_rows, position), see StepBatch. The arrays own
// the batch's memory together; nothing is copied.
py::tuple next_step(Loader& loader) {
  std::unique_ptr<StepBatch> batch;
  while (!batch) {
    {
      const py::gil_scoped_release unlocked;
      batch = loader.take(kWaitSlice);
    }
    if (!batch && PyErr_CheckSignals() != 0) throw py::error_already_set();
  }
  const StepBatch& b = *batch;
  const py::capsule owner(batch.release(),
                          [](void* pointer) { delete static_cast<StepBatch*>(pointer); });
  const auto array = [&](const std::unique_ptr<int32_t[]>& data, int64_t columns) -> py::object {
    if (!data) return py::none();
    return py::array_t<int32_t>({b.num_parts, columns}, data.get(), owner);
  };
  const auto& [shard, offset, epoch] = b.position;
  return py::make_tuple(
      array(b.inputs, b.tokens_per_part), array(b.targets, b.tokens_per_part),
      array(b.cu_seqlens, b.cu_seqlens_entries), array(b.bigram_rows, b.tokens_per_part),
      array(b.sign_rows, b.tokens_per_part), py::make_tuple(shard, offset, epoch));
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "The token loader of csrc/data; use it through speedrun.data.";
  py::register_exception<DataError>(m, "DataError", PyExc_ValueError);
  py::class_<Loader>(m, "Loader")
      .def(py::init(&make_loader), py::kw_only(), py::arg("shards"), py::arg("shapes"),
           py::arg("format"), py::arg("split"), py::arg("repeat"), py::arg("start"),
           py::arg("rank"), py::arg("world_size"), py::arg("bigram_table_rows"),
           py::arg("sign_table_rows"), py::arg("prefetch_steps"))
      .def("next_step", &next_step)
      .def("close", &Loader::close, py::call_guard<py::gil_scoped_release>());
}

}  // namespace speedrun
