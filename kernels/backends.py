"""Which module computes an operation: a table, and the choice `auto`. Imports no torch.

A new operation brings an entry of OPERATIONS and its modules, kernels/<operation>_<backend>.py.
"""

import functools
import importlib
import logging
from dataclasses import dataclass
from typing import Any

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Operation:
    """The modules that compute one operation, one per backend."""

    key: str
    """Config key by which a user chooses the backend; messages name it."""
    modules: dict[str, str]
    """Backend -> module, in the order in which `auto` tries them on a GPU. The last, `torch`, works
    everywhere; `auto` takes it on a CPU."""


OPERATIONS = {
    "masked_cross_entropy": Operation(
        key="loss.backend",
        modules={
            "triton": "sft_fast.kernels.masked_cross_entropy_triton",
            "native": "sft_fast.kernels.masked_cross_entropy_native",
            "torch": "sft_fast.kernels.masked_cross_entropy_torch",
        },
    ),
    "block": Operation(
        key="model.kernels",
        modules={
            "triton": "sft_fast.kernels.block_triton",
            "torch": "sft_fast.kernels.block_torch",
        },
    ),
    "expert_copies": Operation(
        key="model.kernels",
        modules={
            "triton": "sft_fast.kernels.expert_copies_triton",
            "torch": "sft_fast.kernels.expert_copies_torch",
        },
    ),
    "grouped_matmul": Operation(
        key="model.kernels",
        modules={
            "triton": "sft_fast.kernels.grouped_matmul_triton",
            "torch": "sft_fast.kernels.grouped_matmul_torch",
        },
    ),
}


@functools.cache
def load_backend(operation: str, name: str, device_type: str) -> Any:
    """Imports the module that computes an operation; the operation's Protocol says what it holds.

    Args:
        operation: key of OPERATIONS.
        name: one of its backends, or `auto`: on a GPU the first that can be imported, with one
            warning that says why those before it could not; on a CPU `torch`.
        device_type: of the tensors, `cpu` or a GPU's.

    Raises:
        ValueError: there is no such backend, or it cannot be imported here.
    """
    if name != "auto":
        return import_backend(operation, name)
    *faster, fallback = OPERATIONS[operation].modules
    if device_type == "cpu":
        return import_backend(operation, fallback)
    reasons = []
    for candidate in faster:
        try:
            backend = import_backend(operation, candidate)
            break
        except ValueError as error:
            reasons.append(str(error))
    else:
        candidate, backend = fallback, import_backend(operation, fallback)
    if reasons:
        key, why = OPERATIONS[operation].key, "; ".join(reasons)
        log.warning("%s: auto falls back to %s for %s: %s", key, candidate, operation, why)
    return backend


def import_backend(operation: str, name: str) -> Any:
    """Imports one backend of an operation, or raises ValueError as load_backend does."""
    key, modules = OPERATIONS[operation].key, OPERATIONS[operation].modules
    if name not in modules:
        raise ValueError(f"{key}: got {name!r}, expected one of {', '.join(['auto', *modules])}")
    try:
        return importlib.import_module(modules[name])
    except ImportError as error:
        raise ValueError(
            f"{key}: {name!r} cannot be imported ({error}); install it, or choose 'torch'"
        ) from error
