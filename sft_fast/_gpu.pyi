"""Masked cross-entropy on a GPU. Pointers and streams are integers; nothing checks them."""

BF16: int
FP16: int
FP32: int
DEVICE_TYPE: str

class Logits:
    def __init__(
        self,
        *,
        data: int,
        dtype: int,
        num_rows: int,
        width: int,
        row_stride: int,
        labels: int,
        num_columns: int,
        vocab_start_index: int,
        ignore_index: int,
        softcap: float,
    ) -> None: ...
    @property
    def one_pass_width(self) -> int: ...

class LossOptions:
    def __init__(self, *, label_smoothing: float, uniform: float, z_loss: float) -> None: ...

def num_splits(num_rows: int, width: int) -> int: ...
def statistics(
    logits: Logits, out: int, with_logit_sum: bool, with_outputs: bool, stream: int
) -> None: ...
def losses(
    statistics: int,
    labels: int,
    num_parts: int,
    num_rows: int,
    vocab_size: int,
    ignore_index: int,
    with_outputs: bool,
    out: int,
    options: LossOptions,
    stream: int,
) -> None: ...
def gradient(
    logits: Logits,
    out: int,
    out_stride: int,
    statistics: int,
    num_parts: int,
    num_statistics: int,
    grads: int,
    options: LossOptions,
    stream: int,
) -> None: ...
def one_pass(
    logits: Logits, loss: int, weights: int, options: LossOptions, stream: int
) -> None: ...
