"""The device of this process, and the shim that lets megatron-core run without a GPU.

megatron-core names CUDA directly: `torch.cuda.current_device()`, `device="cuda"`, `tensor.type()`
compared with "torch.cuda.FloatTensor". The shim answers those calls with the CPU. `init_device`
installs it, only where no GPU is visible, so the CUDA and ROCm path is untouched.
"""

import contextlib
import functools
import gc
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._device import _device_constructors

CPU = torch.device("cpu")
FACTORIES = (
    "arange",
    "as_tensor",
    "empty",
    "empty_like",
    "full",
    "full_like",
    "ones",
    "ones_like",
    "rand",
    "randint",
    "randn",
    "tensor",
    "zeros",
    "zeros_like",
)


def init_device() -> torch.device:
    """Returns the device this rank computes on, and makes it current: its GPU, or the CPU.

    Without a GPU it installs the CPU shim, so it comes before any call of megatron.
    """
    if not torch.cuda.is_available():
        install_cpu_shim()
        return CPU
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    # It prepares every new shape for a long time, and packing brings new shapes all the time.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def free_memory() -> None:
    """Gives back what nothing refers to any more."""
    gc.collect()
    torch.cuda.empty_cache()


def distributed_backend() -> str:
    """NCCL (RCCL on ROCm answers to the same name) with a GPU, gloo without."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def install_cpu_shim() -> None:
    """Redirects torch's CUDA calls to the CPU when no GPU is visible; later calls do nothing."""
    if torch.cuda.is_available() or getattr(torch.cuda, "_sft_fast_shim", False):
        return
    patch_cuda_module()
    patch_tensor_methods()
    # torch lists its factories at first use, for `with torch.device(...)`: it must list its own.
    _device_constructors()
    for name in FACTORIES:
        setattr(torch, name, on_cpu(getattr(torch, name)))
    patch_rng_tracker()
    dist.all_gather = uneven_all_gather(dist.all_gather)
    torch.cuda._sft_fast_shim = True  # type: ignore[attr-defined]


def is_cuda(device: object) -> bool:
    """Whether a device, or its name, is CUDA's."""
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


def on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a tensor factory so that `device="cuda"` means the CPU."""

    @functools.wraps(factory)
    def call(*args: Any, **kwargs: Any) -> Any:
        if is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return factory(*args, **kwargs)

    return call


class NullStream:
    """Stands for a CUDA stream or event: work on the CPU is already in order."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def nothing(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing."""
        pass

    wait_stream = wait_event = synchronize = record = wait = nothing

    def record_event(self, *args: Any) -> "NullStream":
        """An event that has happened."""
        return NullStream()

    def query(self) -> bool:
        """Always done."""
        return True


def returning(value: Any) -> Callable[..., Any]:
    """A new function that ignores its arguments; torch.compile wants one object per torch name."""
    return lambda *args, **kwargs: value


def calling(function: Callable[..., Any], num_args: int = 0) -> Callable[..., Any]:
    """A new function that passes only its first `num_args` arguments, dropping the device."""
    return lambda *args, **kwargs: function(*args[:num_args])


def patch_cuda_module() -> None:
    """Replaces what megatron calls of torch.cuda."""
    cuda: Any = torch.cuda
    for name in ("synchronize", "set_device", "empty_cache", "reset_peak_memory_stats"):
        setattr(cuda, name, returning(None))
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved"):
        setattr(cuda, name, returning(0))
    cuda.current_device = returning(CPU)
    cuda.Stream, cuda.Event = NullStream, type("NullEvent", (NullStream,), {})
    cuda.current_stream, cuda.default_stream = calling(NullStream), calling(NullStream)
    cuda.stream = calling(contextlib.nullcontext)
    cuda.get_rng_state = calling(torch.get_rng_state)
    cuda.random.get_rng_state = calling(torch.get_rng_state)
    cuda.set_rng_state = calling(torch.set_rng_state, num_args=1)
    cuda.manual_seed = calling(torch.default_generator.manual_seed, num_args=1)
    for name in ("FloatTensor", "HalfTensor", "BFloat16Tensor", "LongTensor", "IntTensor"):
        setattr(cuda, name, getattr(torch, name))
    cuda.nvtx.range_push, cuda.nvtx.range_pop = returning(None), returning(None)


def patch_tensor_methods() -> None:
    """Lets `Tensor.to`, `.type` and `.cuda`, and `Module.cuda`, stay on the CPU."""
    tensor: Any = torch.Tensor
    original_type, original_to = tensor.type, tensor.to

    def type_name(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Tensor.type, naming a CUDA type; of a tensor of any shape."""
        if dtype is not None:
            return original_type(self, dtype, *args, **kwargs)
        return original_type(self).replace("torch.", "torch.cuda.", 1)

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Tensor.to, of a tensor of any shape, with the CPU for a CUDA device."""
        if is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return original_to(self, *(CPU if is_cuda(arg) else arg for arg in args), **kwargs)

    tensor.type = type_name
    tensor.to = to
    tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


def patch_rng_tracker() -> None:
    """megatron's tracker reaches into CUDA generators; give it the CPU generator's state."""
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


def uneven_all_gather(original: Callable[..., Any]) -> Callable[..., Any]:
    """An all_gather that takes tensors of different lengths, as ranks with experts have them.

    gloo's own does not.
    """

    def all_gather(
        outputs: list[torch.Tensor], tensor: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Fills `outputs`, each [its rank's length, ...], with the ranks' tensors."""
        lengths = [len(output) if output.dim() else 1 for output in outputs]
        if len(set(lengths)) == 1:
            return original(outputs, tensor, *args, **kwargs)
        longest = max(lengths)
        padded = tensor.new_zeros(longest, *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in outputs]
        original(parts, padded, *args, **kwargs)
        for output, part in zip(outputs, parts, strict=True):
            output.copy_(part[: len(output)])

    return all_gather
