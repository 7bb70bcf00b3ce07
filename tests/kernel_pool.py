"""Ranks in which every backend of the loss works and torch.empty returns NaN.

With enough GPUs the kernels run there. Else triton runs in its interpreter, which must be on before
triton is imported, and the native kernels run compiled for the CPU, with fibers as threads.
"""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from filelock import FileLock

import emulated_gpu
from rank_pool import RankPool

ON_GPU = torch.cuda.is_available()
ENVIRONMENT = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} if ON_GPU else {"TRITON_INTERPRET": "1"}


class KernelPool(RankPool):
    """A rank pool; functions that it runs find the device as torch's default device."""

    def __init__(self, native_module: Path | None = None) -> None:
        # The server would have imported triton, without its interpreter.
        super().__init__(imports_ahead=False)
        self.native_module = native_module

    def run(self, world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        if ON_GPU and world_size > torch.cuda.device_count():
            pytest.skip(f"needs {world_size} GPUs")
        with mock.patch.dict(os.environ, ENVIRONMENT):
            return super().run(world_size, run_poisoned, self.native_module, function, args)


def run_poisoned(
    native_module: Path | None, function: Callable[..., Any], args: tuple[Any, ...]
) -> Any:
    """Shows what a kernel forgets to write."""
    if ON_GPU:
        torch.set_default_device("cuda")
    elif native_module is not None:
        emulated_gpu.install(native_module)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    return function(*args)


def missing_native() -> str | None:
    """What the native kernels need and this machine lacks."""
    if not ON_GPU:
        return emulated_gpu.missing()
    return None if importlib.util.find_spec("sft_fast._gpu") else "sft_fast._gpu"


def build_native(folder: Path) -> Path | None:
    """The emulated module, where it is needed and can be built; pytest's workers share one."""
    if ON_GPU or emulated_gpu.missing():
        return None
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return emulated_gpu.build(folder)
    # A worker's folders are below those of the session.
    shared = folder.parents[1] / "emulated"
    with FileLock(shared.with_suffix(".lock")):
        if not shared.exists():
            shared.mkdir()
            return emulated_gpu.build(shared)
    (module,) = shared.glob("_gpu*")
    return module


def seeded(seed: int) -> torch.Generator:
    """A generator on the default device."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)
