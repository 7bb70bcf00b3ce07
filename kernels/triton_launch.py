"""What every launch of a Triton kernel asks of its tensors and of the GPU."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
import triton
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
LAYER_KEY = "model.kernels"
"""The config key that chooses the kernels of the layers."""
R = TypeVar("R")


class Operation(Generic[R]):
    """A launcher that torch.compile sees as one operation, and that is called as it is without it.

    A call through PyTorch's registry of custom operations takes the host longer than the launch
    itself, and a layer has several: 0.65 ms for a norm's two passes on one H200's host.

    Attributes:
        registered: the custom operation.
    """

    def __init__(self, name: str, launch: Callable[..., R], mutates_args: tuple[str, ...]) -> None:
        self.launch = launch
        self.registered: Any = torch.library.custom_op(name, launch, mutates_args=mutates_args)
        names = list(inspect.signature(launch).parameters)
        self.written = [names.index(name) for name in mutates_args]
        functools.update_wrapper(self, launch)

    def __call__(self, *args: Any) -> R:
        """Launches at once, or as an operation of PyTorch under torch.compile."""
        if torch.compiler.is_compiling():
            result: R = self.registered(*args)
            return result
        result = self.launch(*args)
        for number in self.written:
            if args[number] is not None:
                # autograd then knows that what it saved is not what it was.
                torch.autograd.graph.increment_version(args[number])
        return result

    def register_fake(self, fake: Callable[..., Any]) -> None:
        """Registers the shapes of the results; used as a decorator."""
        self.registered.register_fake(fake)


def operation(
    name: str, mutates_args: tuple[str, ...] = ()
) -> Callable[[Callable[..., R]], Operation[R]]:
    """A decorator that makes a launcher an Operation called `name`.

    Args:
        name: of the operation.
        mutates_args: names of the arguments that it writes to.
    """
    return lambda launch: Operation(name, launch, mutates_args)


@functools.cache
def gpu_warp_size() -> int:
    """Of the process's GPUs, which are of one kind."""
    return int(triton.runtime.driver.active.get_current_target().warp_size)


def warp_size(tensor: Tensor) -> int:
    """Threads of a warp of a tensor's device."""
    return gpu_warp_size() if tensor.is_cuda else 32


def check_tensor(tensor: Tensor, what: str, key: str) -> None:
    """Raises ValueError for a tensor that no Triton kernel of ours can take.

    Args:
        tensor: of any shape.
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
