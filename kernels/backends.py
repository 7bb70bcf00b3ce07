"""Which kernels compute the loss."""

import functools
import importlib
import logging
from typing import cast

from sft_fast.kernels.masked_cross_entropy import Backend

log = logging.getLogger(__name__)

BACKENDS = {
    "torch": "sft_fast.kernels.masked_cross_entropy_torch",
    "triton": "sft_fast.kernels.masked_cross_entropy_triton",
    "native": "sft_fast.kernels.masked_cross_entropy_native",
}
GPU_ORDER = ("triton", "native")


@functools.cache
def load_backend(name: str, device_type: str) -> Backend:
    """Imports a backend; `auto` is the first of GPU_ORDER that a GPU has, else torch.

    Raises:
        ValueError: there is no such backend, or it cannot be imported here.
    """
    if name != "auto":
        return import_backend(name)
    if device_type == "cpu":
        return import_backend("torch")
    reasons = []
    for candidate in GPU_ORDER:
        try:
            backend = import_backend(candidate)
        except ValueError as error:
            reasons.append(str(error))
            continue
        if reasons:
            log.warning("loss.backend: auto falls back to %s: %s", candidate, "; ".join(reasons))
        return backend
    log.warning("loss.backend: auto falls back to torch: %s", "; ".join(reasons))
    return import_backend("torch")


def import_backend(name: str) -> Backend:
    if name not in BACKENDS:
        raise ValueError(
            f"loss.backend: got {name!r}, expected one of {', '.join(['auto', *BACKENDS])}"
        )
    try:
        return cast(Backend, importlib.import_module(BACKENDS[name]))
    except ImportError as error:
        raise ValueError(
            f"loss.backend: {name!r} cannot be imported ({error}); install it, or choose 'torch'"
        ) from error
