// Module sft_fast._gpu: device pointers and a stream as integers. The caller checks tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <iterator>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "masked_ce/masked_ce.h"

namespace py = pybind11;

namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

SftFastLogits make_logits(uintptr_t data, int dtype, int64_t num_tokens, int64_t width,
                          int64_t row_stride, uintptr_t labels, int64_t num_columns,
                          int64_t vocab_start_index, int64_t vocab_size, int64_t ignore_index) {
  if (dtype < SFT_FAST_BF16 || dtype > SFT_FAST_FP32) {
    throw std::invalid_argument("dtype is " + std::to_string(dtype) + "; expected 0, 1 or 2");
  }
  if (num_tokens < 0 || num_tokens > INT32_MAX || width < 0 || width > INT32_MAX / 2 ||
      num_columns > width) {
    throw std::invalid_argument("logits are " + std::to_string(num_tokens) + " x " +
                                std::to_string(width) + " with " + std::to_string(num_columns) +
                                " columns that count; expected at most 2**31 x 2**30");
  }
  return {pointer<const void>(data),
          row_stride,
          pointer<const int64_t>(labels),
          num_tokens,
          width,
          num_columns,
          vocab_start_index,
          vocab_size,
          ignore_index,
          dtype};
}

std::vector<std::string> option_names() {
  std::istringstream names(sft_fast_masked_ce_options());
  return {std::istream_iterator<std::string>(names), {}};
}

const double* checked(const std::vector<double>& options) {
  if (options.size() != option_names().size()) {
    throw std::invalid_argument(std::to_string(options.size()) + " options of the loss; expected " +
                                sft_fast_masked_ce_options());
  }
  return options.data();
}

void check(int code) {
  if (code != 0) {
    throw std::runtime_error(std::string("masked cross-entropy: ") +
                             sft_fast_masked_ce_error(code));
  }
}

void statistics(const SftFastLogits& logits, const std::vector<double>& options, uintptr_t out,
                bool with_outputs, uintptr_t stream) {
  check(sft_fast_masked_ce_statistics(&logits, checked(options), pointer<float>(out), with_outputs,
                                      pointer<void>(stream)));
}

void losses(uintptr_t statistics_in, uintptr_t labels, int64_t num_parts, int64_t num_tokens,
            int64_t vocab_size, int64_t ignore_index, bool with_outputs,
            const std::vector<double>& options, uintptr_t out, uintptr_t stream) {
  const SftFastStatistics parts{pointer<const float>(statistics_in),
                                pointer<const int64_t>(labels),
                                num_parts,
                                num_tokens,
                                vocab_size,
                                ignore_index,
                                with_outputs};
  check(sft_fast_masked_ce_losses(&parts, checked(options), pointer<float>(out),
                                  pointer<void>(stream)));
}

void gradient(const SftFastLogits& logits, const std::vector<double>& options, uintptr_t out,
              int64_t out_stride, uintptr_t statistics_in, int64_t num_parts,
              int64_t num_statistics, uintptr_t grads, uintptr_t stream) {
  check(sft_fast_masked_ce_gradient(&logits, checked(options), pointer<void>(out), out_stride,
                                    pointer<const float>(statistics_in), num_parts, num_statistics,
                                    pointer<const float>(grads), pointer<void>(stream)));
}

void one_pass(const SftFastLogits& logits, const std::vector<double>& options, uintptr_t loss,
              uintptr_t weights, uintptr_t stream) {
  if (logits.width > sft_fast_masked_ce_one_pass_width(&logits)) {
    throw std::invalid_argument("a row of " + std::to_string(logits.width) +
                                " logits does not fit on chip");
  }
  check(sft_fast_masked_ce_one_pass(&logits, checked(options), pointer<float>(loss),
                                    pointer<const float>(weights), pointer<void>(stream)));
}

}  // namespace

PYBIND11_MODULE(_gpu, module) {
  module.doc() = "Masked cross-entropy kernels. Pointers and the stream are integers.";
#if defined(SFT_FAST_HOST_EMULATION)
  module.attr("DEVICE_TYPE") = "cpu";
#else
  module.attr("DEVICE_TYPE") = "cuda";
#endif
  module.attr("BF16") = static_cast<int>(SFT_FAST_BF16);
  module.attr("FP16") = static_cast<int>(SFT_FAST_FP16);
  module.attr("FP32") = static_cast<int>(SFT_FAST_FP32);
  module.attr("LOSS_OPTIONS") = py::tuple(py::cast(option_names()));
  py::class_<SftFastLogits>(module, "Logits")
      .def(py::init(&make_logits), py::kw_only(), py::arg("data"), py::arg("dtype"),
           py::arg("num_tokens"), py::arg("width"), py::arg("row_stride"), py::arg("labels"),
           py::arg("num_columns"), py::arg("vocab_start_index"), py::arg("vocab_size"),
           py::arg("ignore_index"))
      .def_property_readonly("one_pass_width", &sft_fast_masked_ce_one_pass_width,
                             "Longest row that one_pass takes; 0 if rows are not aligned.");
  module.def("num_splits", &sft_fast_masked_ce_num_splits, py::arg("num_tokens"), py::arg("width"));
  module.def("statistics", &statistics, py::arg("logits"), py::arg("options"), py::kw_only(),
             py::arg("out"), py::arg("with_outputs"), py::arg("stream"));
  module.def("losses", &losses, py::kw_only(), py::arg("statistics"), py::arg("labels"),
             py::arg("num_parts"), py::arg("num_tokens"), py::arg("vocab_size"),
             py::arg("ignore_index"), py::arg("with_outputs"), py::arg("options"), py::arg("out"),
             py::arg("stream"));
  module.def("gradient", &gradient, py::arg("logits"), py::arg("options"), py::kw_only(),
             py::arg("out"), py::arg("out_stride"), py::arg("statistics"), py::arg("num_parts"),
             py::arg("num_statistics"), py::arg("grads"), py::arg("stream"));
  module.def("one_pass", &one_pass, py::arg("logits"), py::arg("options"), py::kw_only(),
             py::arg("loss"), py::arg("weights"), py::arg("stream"));
}
