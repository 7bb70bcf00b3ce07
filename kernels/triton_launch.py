"""What every launch of a Triton kernel asks of its tensors and of the GPU."""

import functools

import torch
import triton
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
LAYER_KEY = "model.kernels"
"""The config key that chooses the kernels of the layers."""


@functools.cache
def gpu_warp_size() -> int:
    """Of the process's GPUs, which are of one kind."""
    return int(triton.runtime.driver.active.get_current_target().warp_size)


def warp_size(tensor: Tensor) -> int:
    return gpu_warp_size() if tensor.is_cuda else 32


def check_tensor(tensor: Tensor, what: str, key: str) -> None:
    """Raises ValueError for a tensor that no Triton kernel of ours can take.

    Args:
        what: the tensor is, in the plural.
        key: the config key by which the kernels were chosen.
    """
    if tensor.dtype not in FLOATS:
        raise ValueError(
            f"{key} triton: {what} are {tensor.dtype}, expected bfloat16, float16 or float32; "
            "choose 'torch'"
        )
    if tensor.device.type == "cpu" and not triton.knobs.runtime.interpret:
        raise ValueError(f"{key} triton: {what} are on the CPU; choose 'torch' or 'auto'")
