"""The loss kernels in CUDA or HIP, from csrc/masked_ce through module _gpu.

For a whole vocabulary there is one more kernel, which reads each logit once for loss and gradient.
The maths and the bytes moved are in kernels/README.md.
"""

from typing import Any

import torch
from torch import Tensor

from sft_fast import _gpu
from sft_fast.constants import IGNORE_INDEX
from sft_fast.kernels.loss_options import OPTION_NAMES, LossOptions
from sft_fast.kernels.masked_cross_entropy import VocabColumns
from sft_fast.kernels.masked_cross_entropy_operators import (
    define_gradient,
    define_losses,
    define_statistics,
    with_numbers,
)

BUILT_FOR = getattr(_gpu, "LOSS_OPTIONS", ())
if BUILT_FOR != OPTION_NAMES:
    # Python files are picked up as they are saved, the module only where it is built again.
    raise ImportError(
        f"module _gpu was built for the loss options ({', '.join(BUILT_FOR)}), expected "
        f"({', '.join(OPTION_NAMES)}); build it again"
    )

SKIPS_MASKED_TOKENS = True

DTYPES = {torch.bfloat16: _gpu.BF16, torch.float16: _gpu.FP16, torch.float32: _gpu.FP32}


def describe(logits: Tensor, labels: Tensor, columns: VocabColumns) -> Any:
    """Checks what the kernels take on trust of logits [N, width] and labels [N]: a _gpu.Logits.

    Raises:
        ValueError: device, dtype, shape or stride that the kernels cannot take.
    """
    num_tokens, width = logits.shape
    if logits.dtype not in DTYPES:
        raise ValueError(
            f"loss.backend native: logits are {logits.dtype}, expected bfloat16, float16 or "
            "float32; choose 'torch'"
        )
    check("logits", logits, logits.dtype, (num_tokens, width), logits.device)
    check("labels", labels, torch.int64, (num_tokens,), logits.device)
    if logits.device.type != _gpu.DEVICE_TYPE:
        raise ValueError(
            f"loss.backend native: logits are on {logits.device}, but the module was built for "
            f"{_gpu.DEVICE_TYPE}; choose 'auto'"
        )
    return _gpu.Logits(
        data=logits.data_ptr(),
        dtype=DTYPES[logits.dtype],
        num_tokens=num_tokens,
        width=width,
        row_stride=logits.stride(0),
        labels=labels.data_ptr(),
        ignore_index=IGNORE_INDEX,
        **columns._asdict(),
    )


def check(
    name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> None:
    """Raises ValueError unless the tensor has this dtype, shape, device, and last stride 1."""
    strides_fit = tensor.dim() == 0 or tensor.shape[-1] <= 1 or tensor.stride(-1) == 1
    if tensor.dim() > 2 and not tensor.is_contiguous():
        strides_fit = False
    if tensor.dtype != dtype or tensor.shape != shape or tensor.device != device or not strides_fit:
        raise ValueError(
            f"loss.backend native: {name} is {tensor.dtype} {list(tensor.shape)} with strides "
            f"{tensor.stride()} on {tensor.device}, expected {dtype} {list(shape)} with last "
            f"stride 1 on {device}"
        )


def stream_of(tensor: Tensor) -> int:
    """The stream on which torch enqueues work for a tensor of any shape, as a number."""
    if tensor.device.type == "cpu":
        return 0
    return torch.cuda.current_stream(tensor.device).cuda_stream


def num_splits(logits: Tensor) -> int:
    """Parts into which the kernels cut logits [N, width]."""
    return _gpu.num_splits(*logits.shape)


def launch_statistics(
    statistics: Tensor,
    logits: Tensor,
    labels: Tensor,
    columns: VocabColumns,
    options: LossOptions,
    with_outputs: bool,
) -> None:
    """Writes statistics [num_splits, S, N] of logits [N, width], none of masked tokens."""
    labels = labels.contiguous()
    described = describe(logits, labels, columns)
    with torch.cuda.device_of(logits):
        _gpu.statistics(
            described,
            options.values(),
            out=statistics.data_ptr(),
            with_outputs=with_outputs,
            stream=stream_of(logits),
        )


shard_statistics = define_statistics(
    "native_masked_cross_entropy_statistics", num_splits, launch_statistics
)


def launch_losses(
    outputs: Tensor,
    statistics: Tensor,
    labels: Tensor,
    vocab_size: int,
    options: LossOptions,
    with_outputs: bool,
) -> None:
    """Writes outputs [1 or 4, N], 0 at masked tokens, from statistics [num_parts, S, N]."""
    statistics, labels = statistics.contiguous(), labels.contiguous()
    num_parts, _, num_tokens = statistics.shape
    shape = (num_parts, options.num_statistics(with_outputs), num_tokens)
    check("statistics", statistics, torch.float32, shape, statistics.device)
    check("labels", labels, torch.int64, (num_tokens,), statistics.device)
    with torch.cuda.device_of(statistics):
        _gpu.losses(
            statistics=statistics.data_ptr(),
            labels=labels.data_ptr(),
            num_parts=num_parts,
            num_tokens=num_tokens,
            vocab_size=vocab_size,
            ignore_index=IGNORE_INDEX,
            with_outputs=with_outputs,
            options=options.values(),
            out=outputs.data_ptr(),
            stream=stream_of(statistics),
        )


token_losses = define_losses("native_masked_cross_entropy_losses", launch_losses)


def launch_gradient(
    gradient: Tensor,
    logits: Tensor,
    labels: Tensor,
    statistics: Tensor,
    grads: Tensor,
    columns: VocabColumns,
    options: LossOptions,
) -> None:
    """Writes gradient [N, width], which may be the logits, from grads [2, N] and statistics."""
    labels, grads, statistics = labels.contiguous(), grads.contiguous(), statistics.contiguous()
    described = describe(logits, labels, columns)
    num_parts, num_statistics, num_tokens = statistics.shape
    check("gradient", gradient, logits.dtype, tuple(logits.shape), logits.device)
    check("grads", grads, torch.float32, (2, num_tokens), logits.device)
    check("statistics", statistics, torch.float32, tuple(statistics.shape), logits.device)
    with torch.cuda.device_of(logits):
        _gpu.gradient(
            described,
            options.values(),
            out=gradient.data_ptr(),
            out_stride=gradient.stride(0),
            statistics=statistics.data_ptr(),
            num_parts=num_parts,
            num_statistics=num_statistics,
            grads=grads.data_ptr(),
            stream=stream_of(logits),
        )


write_gradient = define_gradient("native_masked_cross_entropy_gradient", launch_gradient)


@torch.library.custom_op("sft_fast::native_masked_cross_entropy_one_pass", mutates_args=("logits",))
def one_pass_operator(
    logits: Tensor, labels: Tensor, weights: Tensor, columns: list[int], options: list[float]
) -> Tensor:
    """Returns loss [N]; the gradient takes the place of logits [N, width].

    Raises:
        ValueError: see `describe`; or a row too long to stay on chip, see `fits_one_pass`.
    """
    labels, weights = labels.contiguous(), weights.contiguous()
    described = describe(logits, labels, VocabColumns(*columns))
    check("weights", weights, torch.float32, (len(logits),), logits.device)
    loss = torch.empty_like(weights)
    with torch.cuda.device_of(logits):
        _gpu.one_pass(
            described,
            options,
            loss=loss.data_ptr(),
            weights=weights.data_ptr(),
            stream=stream_of(logits),
        )
    return loss


one_pass_operator.register_fake(
    lambda logits, labels, weights, columns, options: torch.empty_like(weights)
)
loss_and_gradient = with_numbers(one_pass_operator)


def fits_one_pass(logits: Tensor, labels: Tensor) -> bool:
    """Whether loss_and_gradient takes logits [N, width]; if not, use the other kernels."""
    return logits.shape[1] <= describe(logits, labels, VocabColumns(0, 0, 0)).one_pass_width
