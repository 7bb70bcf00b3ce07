"""The loss kernels in CUDA or HIP, from csrc/masked_ce through module _gpu.

For a whole vocabulary there is one more kernel, which reads each logit once for loss and gradient.
The maths and the bytes moved are in kernels/README.md.
"""

from typing import Any

import torch
from torch import Tensor

from sft_fast import _gpu
from sft_fast.constants import IGNORE_INDEX

SKIPS_MASKED_ROWS = True

DTYPES = {torch.bfloat16: _gpu.BF16, torch.float16: _gpu.FP16, torch.float32: _gpu.FP32}


def describe(
    logits: Tensor, labels: Tensor, vocab_start_index: int, num_columns: int, softcap: float
) -> Any:
    """Checks what the kernels take on trust, and returns it as a _gpu.Logits.

    Raises:
        ValueError: device, dtype, shape or stride that the kernels cannot take.
    """
    num_rows, width = logits.shape
    if logits.dtype not in DTYPES:
        raise ValueError(
            f"loss.backend native: logits are {logits.dtype}, expected bfloat16, float16 or "
            "float32; choose 'torch'"
        )
    check("logits", logits, logits.dtype, (num_rows, width), logits.device)
    check("labels", labels, torch.int64, (num_rows,), logits.device)
    if logits.device.type != _gpu.DEVICE_TYPE:
        raise ValueError(
            f"loss.backend native: logits are on {logits.device}, but the module was built for "
            f"{_gpu.DEVICE_TYPE}; choose 'auto'"
        )
    return _gpu.Logits(
        data=logits.data_ptr(),
        dtype=DTYPES[logits.dtype],
        num_rows=num_rows,
        width=width,
        row_stride=logits.stride(0),
        labels=labels.data_ptr(),
        num_columns=num_columns,
        vocab_start_index=vocab_start_index,
        ignore_index=IGNORE_INDEX,
        softcap=softcap,
    )


def check(
    name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> None:
    """Raises ValueError unless the tensor is as described; only its first stride is free."""
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
    if tensor.device.type == "cpu":
        return 0
    return torch.cuda.current_stream(tensor.device).cuda_stream


@torch.library.custom_op("sft_fast::native_masked_cross_entropy_statistics", mutates_args=())
def shard_statistics(
    logits: Tensor,
    labels: Tensor,
    vocab_start_index: int,
    num_columns: int,
    softcap: float,
    with_logit_sum: bool,
    with_outputs: bool,
) -> Tensor:
    """Statistics of one vocabulary shard, without those of masked rows, which are not written.

    Arguments and meaning as in masked_cross_entropy_torch, but: logits bf16, fp16 or fp32 with
    last stride 1; labels may be IGNORE_INDEX; the lowest finite number stands in place of a
    maximum of -inf.

    Returns:
        [num_splits, S, N] fp32, each split a part of the vocabulary.
    """
    labels = labels.contiguous()
    described = describe(logits, labels, vocab_start_index, num_columns, softcap)
    statistics = new_statistics(logits, with_logit_sum, with_outputs)
    with torch.cuda.device_of(logits):
        _gpu.statistics(
            described,
            out=statistics.data_ptr(),
            with_logit_sum=with_logit_sum,
            with_outputs=with_outputs,
            stream=stream_of(logits),
        )
    return statistics


def new_statistics(logits: Tensor, with_logit_sum: bool, with_outputs: bool) -> Tensor:
    """Empty fp32 [splits, S, N]."""
    num_rows, width = logits.shape
    shape = (_gpu.num_splits(num_rows, width), 3 + with_logit_sum + 2 * with_outputs, num_rows)
    return logits.new_empty(shape, dtype=torch.float32)


@shard_statistics.register_fake
def _(
    logits: Tensor,
    labels: Tensor,
    vocab_start_index: int,
    num_columns: int,
    softcap: float,
    with_logit_sum: bool,
    with_outputs: bool,
) -> Tensor:
    return new_statistics(logits, with_logit_sum, with_outputs)


@torch.library.custom_op("sft_fast::native_masked_cross_entropy_losses", mutates_args=())
def row_losses(
    statistics: Tensor,
    labels: Tensor,
    vocab_size: int,
    label_smoothing: float,
    z_loss: float,
    with_outputs: bool,
) -> Tensor:
    """Joins the statistics of all parts of the vocabulary into the loss of each row.

    Arguments and result as in masked_cross_entropy_torch, but: labels may be IGNORE_INDEX: the
    statistics of such rows are not read, and all their results are 0.
    """
    statistics, labels = statistics.contiguous(), labels.contiguous()
    num_parts, _, num_rows = statistics.shape
    shape = (num_parts, 3 + (label_smoothing > 0) + 2 * with_outputs, num_rows)
    check("statistics", statistics, torch.float32, shape, statistics.device)
    check("labels", labels, torch.int64, (num_rows,), statistics.device)
    outputs = new_outputs(statistics, with_outputs)
    with torch.cuda.device_of(statistics):
        _gpu.losses(
            statistics=statistics.data_ptr(),
            labels=labels.data_ptr(),
            num_parts=num_parts,
            num_rows=num_rows,
            vocab_size=vocab_size,
            ignore_index=IGNORE_INDEX,
            with_outputs=with_outputs,
            out=outputs.data_ptr(),
            options=make_options(label_smoothing, z_loss, vocab_size),
            stream=stream_of(statistics),
        )
    return outputs


def new_outputs(statistics: Tensor, with_outputs: bool) -> Tensor:
    """Empty fp32 [1 or 4, N]."""
    return statistics.new_empty((4 if with_outputs else 1, statistics.shape[2]))


@row_losses.register_fake
def _(
    statistics: Tensor,
    labels: Tensor,
    vocab_size: int,
    label_smoothing: float,
    z_loss: float,
    with_outputs: bool,
) -> Tensor:
    return new_outputs(statistics, with_outputs)


@torch.library.custom_op(
    "sft_fast::native_masked_cross_entropy_gradient", mutates_args=("gradient",)
)
def write_gradient(
    gradient: Tensor,
    logits: Tensor,
    labels: Tensor,
    statistics: Tensor,
    grads: Tensor,
    vocab_start_index: int,
    num_columns: int,
    vocab_size: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> None:
    """Writes the gradient of sum(grads[0] * loss + grads[1] * logprob) with respect to logits.

    Arguments as in masked_cross_entropy_torch, but: last stride 1; labels may be IGNORE_INDEX:
    such rows are not read, and get 0.
    """
    labels, grads, statistics = labels.contiguous(), grads.contiguous(), statistics.contiguous()
    described = describe(logits, labels, vocab_start_index, num_columns, softcap)
    num_parts, num_statistics, num_rows = statistics.shape
    check("gradient", gradient, logits.dtype, tuple(logits.shape), logits.device)
    check("grads", grads, torch.float32, (2, num_rows), logits.device)
    check("statistics", statistics, torch.float32, tuple(statistics.shape), logits.device)
    with torch.cuda.device_of(logits):
        _gpu.gradient(
            described,
            out=gradient.data_ptr(),
            out_stride=gradient.stride(0),
            statistics=statistics.data_ptr(),
            num_parts=num_parts,
            num_statistics=num_statistics,
            grads=grads.data_ptr(),
            options=make_options(label_smoothing, z_loss, vocab_size),
            stream=stream_of(logits),
        )


@write_gradient.register_fake
def _(
    gradient: Tensor,
    logits: Tensor,
    labels: Tensor,
    statistics: Tensor,
    grads: Tensor,
    vocab_start_index: int,
    num_columns: int,
    vocab_size: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> None:
    return None


def make_options(label_smoothing: float, z_loss: float, vocab_size: int) -> Any:
    """The options as the C++ module takes them."""
    return _gpu.LossOptions(
        label_smoothing=label_smoothing, uniform=label_smoothing / vocab_size, z_loss=z_loss
    )


@torch.library.custom_op("sft_fast::native_masked_cross_entropy_one_pass", mutates_args=("logits",))
def loss_and_gradient(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    num_columns: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> Tensor:
    """Loss of each row of a whole vocabulary; its weighted gradient takes the logits' place.

    Args:
        logits: [N, >= num_columns] bf16, fp16 or fp32, last stride 1. Masked rows and padding
            columns get 0.
        labels: [N] int64 ids, or IGNORE_INDEX.
        weights: [N] fp32, upstream gradient of each row's loss.
        num_columns: columns that count.
        label_smoothing: share of the target that is spread.
        z_loss: factor of lse**2.
        softcap: bound of the logits; 0 = none.

    Returns:
        [N] fp32, not weighted; 0 at masked rows.

    Raises:
        ValueError: see `describe`; or a row too long to stay on chip, see `fits_one_pass`.
    """
    labels, weights = labels.contiguous(), weights.contiguous()
    described = describe(logits, labels, 0, num_columns, softcap)
    check("weights", weights, torch.float32, (len(logits),), logits.device)
    loss = torch.empty_like(weights)
    with torch.cuda.device_of(logits):
        _gpu.one_pass(
            described,
            loss=loss.data_ptr(),
            weights=weights.data_ptr(),
            options=make_options(label_smoothing, z_loss, num_columns),
            stream=stream_of(logits),
        )
    return loss


@loss_and_gradient.register_fake
def _(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    num_columns: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> Tensor:
    return torch.empty_like(weights)


def fits_one_pass(logits: Tensor, labels: Tensor) -> bool:
    """Whether loss_and_gradient takes these logits; if not, use the other kernels."""
    return logits.shape[1] <= describe(logits, labels, 0, 0, 0.0).one_pass_width
