// Module sft_fast._gpu: device pointers and a stream as integers. The caller checks tensors.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "masked_ce/masked_ce.h"

namespace py = pybind11;

namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

SftFastLogits make_logits(uintptr_t data, int dtype, int64_t num_rows, int64_t width,
                          int64_t row_stride, uintptr_t labels, int64_t num_columns,
                          int64_t vocab_start_index, int64_t ignore_index, float softcap) {
  if (dtype < SFT_FAST_BF16 || dtype > SFT_FAST_FP32) {
    throw std::invalid_argument("dtype is " + std::to_string(dtype) + "; expected 0, 1 or 2");
  }
  if (num_rows < 0 || num_rows > INT32_MAX || width < 0 || width > INT32_MAX / 2 ||
      num_columns > width) {
    throw std::invalid_argument("logits are " + std::to_string(num_rows) + " x " +
                                std::to_string(width) + " with " + std::to_string(num_columns) +
                                " columns that count; expected at most 2**31 x 2**30");
  }
  return {pointer<const void>(data),
          row_stride,
          pointer<const int64_t>(labels),
          num_rows,
          width,
          num_columns,
          vocab_start_index,
          ignore_index,
          softcap,
          dtype};
}

void check(int code) {
  if (code != 0) {
    throw std::runtime_error(std::string("masked cross-entropy: ") +
                             sft_fast_masked_ce_error(code));
  }
}

void statistics(const SftFastLogits& logits, uintptr_t out, bool with_logit_sum, bool with_outputs,
                uintptr_t stream) {
  check(sft_fast_masked_ce_statistics(&logits, pointer<float>(out), with_logit_sum, with_outputs,
                                      pointer<void>(stream)));
}

void losses(uintptr_t statistics_in, uintptr_t labels, int64_t num_parts, int64_t num_rows,
            int64_t vocab_size, int64_t ignore_index, bool with_outputs, uintptr_t out,
            const SftFastLossOptions& options, uintptr_t stream) {
  const SftFastStatistics parts{pointer<const float>(statistics_in),
                                pointer<const int64_t>(labels),
                                num_parts,
                                num_rows,
                                vocab_size,
                                ignore_index,
                                with_outputs};
  check(sft_fast_masked_ce_losses(&parts, pointer<float>(out), &options, pointer<void>(stream)));
}

void gradient(const SftFastLogits& logits, uintptr_t out, int64_t out_stride,
              uintptr_t statistics_in, int64_t num_parts, int64_t num_statistics, uintptr_t grads,
              const SftFastLossOptions& options, uintptr_t stream) {
  check(sft_fast_masked_ce_gradient(&logits, pointer<void>(out), out_stride,
                                    pointer<const float>(statistics_in), num_parts, num_statistics,
                                    pointer<const float>(grads), &options, pointer<void>(stream)));
}

void one_pass(const SftFastLogits& logits, uintptr_t loss, uintptr_t weights,
              const SftFastLossOptions& options, uintptr_t stream) {
  if (logits.width > sft_fast_masked_ce_one_pass_width(&logits)) {
    throw std::invalid_argument("a row of " + std::to_string(logits.width) +
                                " logits does not fit on chip");
  }
  check(sft_fast_masked_ce_one_pass(&logits, pointer<float>(loss), pointer<const float>(weights),
                                    &options, pointer<void>(stream)));
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
  py::class_<SftFastLogits>(module, "Logits")
      .def(py::init(&make_logits), py::kw_only(), py::arg("data"), py::arg("dtype"),
           py::arg("num_rows"), py::arg("width"), py::arg("row_stride"), py::arg("labels"),
           py::arg("num_columns"), py::arg("vocab_start_index"), py::arg("ignore_index"),
           py::arg("softcap"))
      .def_property_readonly("one_pass_width", &sft_fast_masked_ce_one_pass_width,
                             "Longest row that one_pass takes; 0 if rows are not aligned.");
  py::class_<SftFastLossOptions>(module, "LossOptions")
      .def(py::init<float, float, float>(), py::kw_only(), py::arg("label_smoothing"),
           py::arg("uniform"), py::arg("z_loss"));
  module.def("num_splits", &sft_fast_masked_ce_num_splits, py::arg("num_rows"), py::arg("width"));
  module.def("statistics", &statistics, py::arg("logits"), py::arg("out"),
             py::arg("with_logit_sum"), py::arg("with_outputs"), py::arg("stream"));
  module.def("losses", &losses, py::arg("statistics"), py::arg("labels"), py::arg("num_parts"),
             py::arg("num_rows"), py::arg("vocab_size"), py::arg("ignore_index"),
             py::arg("with_outputs"), py::arg("out"), py::arg("options"), py::arg("stream"));
  module.def("gradient", &gradient, py::arg("logits"), py::arg("out"), py::arg("out_stride"),
             py::arg("statistics"), py::arg("num_parts"), py::arg("num_statistics"),
             py::arg("grads"), py::arg("options"), py::arg("stream"));
  module.def("one_pass", &one_pass, py::arg("logits"), py::arg("loss"), py::arg("weights"),
             py::arg("options"), py::arg("stream"));
}
