// Module sft_fast._C: names, argument checks and docstrings. The work is in csrc/packing.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "packing/common.hpp"
#include "packing/fill.hpp"
#include "packing/plan.hpp"
#include "packing/window.hpp"

namespace py = pybind11;

namespace {

// Nothing is converted: a silent copy would hide a wrong dtype, and lose what is written to it.
void check_vector(const py::array& array, const py::dtype& dtype, const char* name) {
  // One type has one object, as a rule; to compare two takes longer than all else here.
  const bool has_dtype = array.dtype().is(dtype) || array.dtype().equal(dtype);
  const bool usable = array.ndim() == 1 && has_dtype && (array.flags() & py::array::c_style) != 0 &&
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
  py::capsule owner(data, [](void* memory) { std::free(memory); });
  array.data.release();
  return py::array_t<T>(static_cast<py::ssize_t>(array.size), data, owner);
}

const sft_fast::Strategy& find_strategy(const std::string& name) {
  std::string names;
  for (const sft_fast::Strategy& strategy : sft_fast::kStrategies) {
    if (name == strategy.name) return strategy;
    names += (names.empty() ? "" : ", ") + std::string(strategy.name);
  }
  throw std::invalid_argument("packing.strategy is '" + name + "'; expected one of " + names);
}

py::tuple plan(const std::string& strategy, const py::array& lengths, int64_t capacity,
               uint64_t seed, uint64_t epoch, int64_t alignment, int64_t max_samples,
               int64_t pool_size) {
  const auto plan_bins = find_strategy(strategy).plan;
  const std::span<const int32_t> view = input<int32_t>(lengths, "lengths");
  const sft_fast::PlanOptions options{capacity, alignment, max_samples, pool_size, seed, epoch};
  sft_fast::BinPlan plan = [&] {
    py::gil_scoped_release release;
    return plan_bins(view, options);
  }();
  return py::make_tuple(to_numpy(std::move(plan.sample_ids)), to_numpy(std::move(plan.bin_offsets)),
                        to_numpy(std::move(plan.order)));
}

py::tuple strategy_names() {
  py::list names;
  for (const sft_fast::Strategy& strategy : sft_fast::kStrategies) names.append(strategy.name);
  return py::tuple(names);
}

template <sft_fast::Array<uint32_t> order(int64_t, uint64_t, uint64_t)>
void def_order(py::module_& module, const char* name, const char* doc) {
  module.def(
      name,
      [](int64_t count, uint64_t seed, uint64_t epoch) {
        return to_numpy(order(count, seed, epoch));
      },
      py::arg("count"), py::arg("seed"), py::arg("epoch"), doc);
}

// WindowPacker for a stream of samples that Python holds.
class StreamPacker {
 public:
  StreamPacker(int64_t capacity, uint64_t seed, int64_t alignment, int64_t max_samples,
               int64_t pool_size, uint64_t num_draws)
      : options_(checked({capacity, alignment, max_samples, pool_size, seed, 0})),
        packer_(options_, num_draws) {}

  void add(int64_t id, int64_t length) {
    packer_.add(id, sft_fast::checked_size(id, length, options_));
  }

  bool needs_more() const { return packer_.needs_more(); }
  uint64_t num_draws() const { return packer_.num_draws(); }

  py::array_t<int64_t> take_bin() {
    if (packer_.count() == 0) throw std::invalid_argument("the pool holds no sample");
    std::vector<int64_t> ids;
    packer_.take_bin([&](int64_t id) { ids.push_back(id); });
    return to_array(ids);
  }

  py::array_t<int64_t> ids() const {
    std::vector<int64_t> ids;
    for (const auto& item : packer_.items()) ids.push_back(item.id);
    return to_array(ids);
  }

 private:
  static sft_fast::PlanOptions checked(const sft_fast::PlanOptions& options) {
    sft_fast::check_options(options);
    return options;
  }

  static py::array_t<int64_t> to_array(const std::vector<int64_t>& values) {
    return py::array_t<int64_t>(static_cast<py::ssize_t>(values.size()), values.data());
  }

  sft_fast::PlanOptions options_;
  sft_fast::WindowPacker packer_;
};

template <typename Id>
sft_fast::MicroBatchCounts fill(const sft_fast::TokenStoreView& store, const py::array& sample_ids,
                                int64_t ignore_index, const sft_fast::SequenceLayout& layout,
                                py::array tokens, py::array labels, py::array position_ids,
                                py::array cu_seqlens, py::array active_tokens,
                                std::optional<py::array> weights) {
  const std::span<const int64_t> ids = input<int64_t>(sample_ids, "sample_ids");
  sft_fast::MicroBatchView<Id> out{output<Id>(tokens, "tokens"),
                                   output<Id>(labels, "labels"),
                                   output<Id>(position_ids, "position_ids"),
                                   output<int32_t>(cu_seqlens, "cu_seqlens"),
                                   output<int64_t>(active_tokens, "active_tokens"),
                                   {}};
  if (weights) out.weights = output<float>(*weights, "weights");
  py::gil_scoped_release release;
  return sft_fast::fill_micro_batch(store, ids, ignore_index, layout, out);
}

sft_fast::TokenStoreView store_view(const py::array& tokens, const py::array& supervised_bits,
                                    const py::array& offsets,
                                    const std::optional<py::array>& token_weights) {
  sft_fast::TokenStoreView store{input<uint32_t>(tokens, "store_tokens"),
                                 input<uint8_t>(supervised_bits, "supervised_bits"),
                                 input<int64_t>(offsets, "offsets"),
                                 {}};
  if (token_weights) store.weights = input<uint16_t>(*token_weights, "token_weights");
  return store;
}

py::tuple fill_micro_batch(const py::array& store_tokens, const py::array& supervised_bits,
                           const py::array& offsets, const py::array& sample_ids,
                           int64_t ignore_index, py::array tokens, py::array labels,
                           py::array position_ids, py::array cu_seqlens, py::array active_tokens,
                           const std::optional<py::array>& token_weights,
                           std::optional<py::array> weights, int64_t alignment, int64_t cp_size,
                           int64_t cp_rank) {
  const auto store = store_view(store_tokens, supervised_bits, offsets, token_weights);
  const bool is_int32 = tokens.itemsize() == 4;
  const auto fill_ids = is_int32 ? fill<int32_t> : fill<int64_t>;
  const sft_fast::MicroBatchCounts counts =
      fill_ids(store, sample_ids, ignore_index, {alignment, cp_size, cp_rank}, std::move(tokens),
               std::move(labels), std::move(position_ids), std::move(cu_seqlens),
               std::move(active_tokens), std::move(weights));
  return py::make_tuple(counts.num_tokens, counts.num_supervised, counts.max_seqlen);
}

py::tuple count_targets(const py::array& store_tokens, const py::array& supervised_bits,
                        const py::array& offsets, const std::optional<py::array>& token_weights) {
  const auto store = store_view(store_tokens, supervised_bits, offsets, token_weights);
  const size_t num_samples = store.offsets.empty() ? 0 : store.offsets.size() - 1;
  sft_fast::Array<int32_t> counts(num_samples);
  sft_fast::Array<double> weights(token_weights ? num_samples : 0);
  {
    py::gil_scoped_release release;
    sft_fast::count_targets(store, {counts.data.get(), counts.size},
                            {weights.data.get(), weights.size});
  }
  py::object sums = py::none();
  if (token_weights) sums = to_numpy(std::move(weights));
  return py::make_tuple(to_numpy(std::move(counts)), sums);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Packing on the CPU. Every function releases the GIL and raises ValueError.";
  module.attr("STRATEGIES") = strategy_names();
  module.def("plan", &plan, py::arg("strategy"), py::arg("lengths"), py::arg("capacity"),
             py::arg("seed"), py::arg("epoch"), py::kw_only(), py::arg("alignment") = 1,
             py::arg("max_samples") = 0, py::arg("pool_size") = 1000,
             R"(Bins of int32[N] lengths by one of STRATEGIES.

A length is 1 to capacity; it takes up a multiple of `alignment` tokens. max_samples is per bin, 0 =
no limit; pool_size is the least number of samples that "window" chooses from. Returns (sample_ids
uint32[N], bin_offsets int64[B + 1], order uint32[B]): the i-th bin to train on is
sample_ids[bin_offsets[b]:bin_offsets[b + 1]] with b = order[i].)");
  def_order<sft_fast::bin_order>(module, "bin_order", "The order that a plan has for its bins.");
  def_order<sft_fast::sample_order>(module, "sample_order",
                                    "The order that \"window\" starts from.");
  py::class_<StreamPacker>(module, "StreamPacker", "Packs a stream as \"window\" does.")
      .def(py::init<int64_t, uint64_t, int64_t, int64_t, int64_t, uint64_t>(), py::arg("capacity"),
           py::arg("seed"), py::kw_only(), py::arg("alignment") = 1, py::arg("max_samples") = 0,
           py::arg("pool_size") = 1000, py::arg("num_draws") = 0,
           "num_draws and the samples of ids(), added in that order, continue an earlier packer.")
      .def("add", &StreamPacker::add, py::arg("id"), py::arg("length"),
           "Takes in a sample; ids are the caller's.")
      .def("needs_more", &StreamPacker::needs_more, "True until the pool can fill a bin well.")
      .def("take_bin", &StreamPacker::take_bin, "Ids of the next bin, int64[n].")
      .def("ids", &StreamPacker::ids, "Ids in the pool, oldest first, int64[n].")
      .def_property_readonly("num_draws", &StreamPacker::num_draws, "Random numbers drawn so far.");
  module.def("fill_micro_batch", &fill_micro_batch, py::arg("store_tokens"),
             py::arg("supervised_bits"), py::arg("offsets"), py::arg("sample_ids"),
             py::arg("ignore_index"), py::arg("tokens").noconvert(), py::arg("labels").noconvert(),
             py::arg("position_ids").noconvert(), py::arg("cu_seqlens").noconvert(),
             py::arg("active_tokens").noconvert(), py::kw_only(),
             py::arg("token_weights") = py::none(), py::arg("weights") = py::none(),
             py::arg("alignment") = 1, py::arg("cp_size") = 1, py::arg("cp_rank") = 0,
             R"(Writes the samples, one after another and then padding, into caller-owned arrays.

Shapes, with n sample_ids and T tokens: store_tokens uint32[total], supervised_bits
uint8[ceil(total / 8)], offsets int64[num_samples + 1]; tokens, labels, position_ids int32[T] or
int64[T]; active_tokens int64[T]; cu_seqlens int32[n + 1]; token_weights uint16[total], the bits of
fp16, and weights float32[T], both or neither. A sample is padded to a multiple of `alignment`. With
cp_size > 1, T is the share of one context-parallel rank: chunks cp_rank and
2 * cp_size - 1 - cp_rank of the 2 * cp_size chunks of each padded sample; cu_seqlens is that of all ranks.
Returns (num_tokens, num_supervised, max_seqlen); the first num_supervised elements of active_tokens
are valid. Nothing is written if an argument is wrong, but for an id that int32 cannot hold and for a
target's weight that is not positive.)");
  module.def("count_targets", &count_targets, py::arg("store_tokens"), py::arg("supervised_bits"),
             py::arg("offsets"), py::arg("token_weights") = py::none(),
             R"(Counts the targets of every sample, whose first token is none.

Arguments as for fill_micro_batch. Returns (targets int32[N], sum of their weights float64[N] or
None).)");
}
