// Module sft_fast._C: names, argument checks and docstrings. The work is in csrc/packing.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <span>
#include <string>
#include <utility>

#include "packing/fill.hpp"
#include "packing/plan.hpp"

namespace py = pybind11;

namespace {

// Nothing is converted: a silent copy would hide a wrong dtype, and lose what is written to it.
void check_vector(const py::array& array, const py::dtype& dtype, const char* name) {
  const bool usable = array.ndim() == 1 && array.dtype().equal(dtype) &&
                      (array.flags() & py::array::c_style) != 0 &&
                      (array.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_) != 0;
  if (!usable) {
    throw std::invalid_argument(std::string(name) + " is a " + std::to_string(array.ndim()) +
                                "-d " + py::str(py::object(array.dtype())).cast<std::string>() +
                                " array; expected a contiguous, aligned 1-d " +
                                py::str(py::object(dtype)).cast<std::string>() + " array");
  }
}

template <typename T>
std::span<const T> input(const py::array& array, const char* name) {
  check_vector(array, py::dtype::of<T>(), name);
  return {static_cast<const T*>(array.data()), static_cast<size_t>(array.size())};
}

template <typename T>
std::span<T> output(py::array& array, const char* name) {
  check_vector(array, py::dtype::of<T>(), name);
  if (!array.writeable()) throw std::invalid_argument(std::string(name) + " is read-only");
  return {static_cast<T*>(array.mutable_data()), static_cast<size_t>(array.size())};
}

// Hands the memory to numpy without a copy.
template <typename T>
py::array_t<T> to_numpy(sft_fast::Array<T> array) {
  T* data = array.data.get();
  py::capsule owner(data, [](void* memory) { delete[] static_cast<T*>(memory); });
  array.data.release();
  return py::array_t<T>(static_cast<py::ssize_t>(array.size), data, owner);
}

using Planner = sft_fast::BinPlan (*)(std::span<const int32_t>, int64_t, uint64_t, uint64_t);

template <Planner plan_bins>
py::tuple plan(const py::array& lengths, int64_t capacity, uint64_t seed, uint64_t epoch) {
  const std::span<const int32_t> view = input<int32_t>(lengths, "lengths");
  sft_fast::BinPlan plan = [&] {
    py::gil_scoped_release release;
    return plan_bins(view, capacity, seed, epoch);
  }();
  return py::make_tuple(to_numpy(std::move(plan.sample_ids)), to_numpy(std::move(plan.bin_offsets)),
                        to_numpy(std::move(plan.order)));
}

py::tuple fill_micro_batch(const py::array& store_tokens, const py::array& supervised_bits,
                           const py::array& offsets, const py::array& sample_ids,
                           int64_t ignore_index, py::array tokens, py::array labels,
                           py::array position_ids, py::array cu_seqlens, py::array active_rows) {
  const sft_fast::TokenStoreView store{input<uint32_t>(store_tokens, "store_tokens"),
                                       input<uint8_t>(supervised_bits, "supervised_bits"),
                                       input<int64_t>(offsets, "offsets")};
  const std::span<const int64_t> ids = input<int64_t>(sample_ids, "sample_ids");
  const sft_fast::MicroBatchView out{
      output<int64_t>(tokens, "tokens"), output<int64_t>(labels, "labels"),
      output<int64_t>(position_ids, "position_ids"), output<int32_t>(cu_seqlens, "cu_seqlens"),
      output<int64_t>(active_rows, "active_rows")};
  const sft_fast::MicroBatchCounts counts = [&] {
    py::gil_scoped_release release;
    return sft_fast::fill_micro_batch(store, ids, ignore_index, out);
  }();
  return py::make_tuple(counts.num_tokens, counts.num_supervised, counts.max_seqlen);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Packing on the CPU. Every function releases the GIL and raises ValueError.";
  module.def("plan_best_fit_decreasing", &plan<sft_fast::plan_best_fit_decreasing>,
             py::arg("lengths"), py::arg("capacity"), py::arg("seed"), py::arg("epoch"),
             R"(Best-fit decreasing over int32[N] lengths, each 1 to capacity.

Returns (sample_ids int64[N], bin_offsets int64[B + 1], order uint32[B]): the i-th bin to train on
is sample_ids[bin_offsets[b]:bin_offsets[b + 1]] with b = order[i].)");
  module.def(
      "plan_one_per_bin", &plan<sft_fast::plan_one_per_bin>, py::arg("lengths"),
      py::arg("capacity"), py::arg("seed"), py::arg("epoch"),
      "One sample per bin, bins in random order; returns what plan_best_fit_decreasing does.");
  module.def("fill_micro_batch", &fill_micro_batch, py::arg("store_tokens"),
             py::arg("supervised_bits"), py::arg("offsets"), py::arg("sample_ids"), py::kw_only(),
             py::arg("ignore_index"), py::arg("tokens").noconvert(), py::arg("labels").noconvert(),
             py::arg("position_ids").noconvert(), py::arg("cu_seqlens").noconvert(),
             py::arg("active_rows").noconvert(),
             R"(Writes the samples, one after another and then padding, into the five last arrays.

Shapes, with n sample_ids and T rows: store_tokens uint32[total], supervised_bits
uint8[ceil(total / 8)], offsets int64[num_samples + 1]; tokens, labels, position_ids, active_rows
int64[T]; cu_seqlens int32[n + 1]. Returns (num_tokens, num_supervised, max_seqlen); the first
num_supervised elements of active_rows are valid. Nothing is written if an argument is wrong.)");
}
