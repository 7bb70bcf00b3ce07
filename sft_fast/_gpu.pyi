"""Masked cross-entropy on a GPU. Pointers and streams are integers; nothing checks them.

`options` are the values of kernels/loss_options.LossOptions, in the order of LOSS_OPTIONS.
"""

BF16: int
FP16: int
FP32: int
DEVICE_TYPE: str
LOSS_OPTIONS: tuple[str, ...]

class Logits:
    def __init__(
        self,
        *,
        data: int,
        dtype: int,
        num_tokens: int,
        width: int,
        row_stride: int,
        labels: int,
        num_columns: int,
        vocab_start_index: int,
        vocab_size: int,
        ignore_index: int,
    ) -> None: ...
    @property
    def one_pass_width(self) -> int: ...

def num_splits(num_tokens: int, width: int) -> int: ...
def statistics(
    logits: Logits, options: list[float], *, out: int, with_outputs: bool, stream: int
) -> None: ...
def losses(
    *,
    statistics: int,
    labels: int,
    num_parts: int,
    num_tokens: int,
    vocab_size: int,
    ignore_index: int,
    with_outputs: bool,
    options: list[float],
    out: int,
    stream: int,
) -> None: ...
def gradient(
    logits: Logits,
    options: list[float],
    *,
    out: int,
    out_stride: int,
    statistics: int,
    num_parts: int,
    num_statistics: int,
    grads: int,
    stream: int,
) -> None: ...
def one_pass(
    logits: Logits, options: list[float], *, loss: int, weights: int, stream: int
) -> None: ...
