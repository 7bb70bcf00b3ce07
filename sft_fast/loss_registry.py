"""Losses of your own: a function of the tokens' log probabilities.

Name the file in the config's `plugins` and the loss in `loss.custom`:

    @register_loss("focal")
    def focal(logprobs: Tensor, labels: Tensor) -> Tensor:
        return -(1 - logprobs.exp()) ** 2 * logprobs
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    CustomLoss = Callable[[Tensor, Tensor], Tensor]

_registered: dict[str, CustomLoss] = {}


def register_loss(name: str) -> Callable[[CustomLoss], CustomLoss]:
    """Returns a decorator that makes a function the loss `name`.

    The function gets logprobs [b, s] fp32, log p(label) of each token and 0 where masked, and
    labels [b, s] int64, IGNORE_INDEX where masked. It returns the loss of each token [b, s],
    which is summed and divided by the supervised tokens of the global batch. It runs on every
    tensor-parallel rank alike, so it must not draw random numbers; masked tokens are cut out
    of its result.

    Raises:
        ValueError: the name is empty, or another function has it.
    """

    def register(loss: CustomLoss) -> CustomLoss:
        if not name:
            raise ValueError("a loss was registered without a name; expected one for loss.custom")
        if _registered.get(name, loss) is not loss:
            raise ValueError(f"loss {name!r} is already {_registered[name]!r}, not {loss!r}")
        _registered[name] = loss
        return loss

    return register


def get_loss(name: str) -> CustomLoss:
    """Returns the loss `name`.

    Raises:
        ValueError: there is none; the message lists all names.
    """
    if name not in _registered:
        names = ", ".join(sorted(_registered)) or "none"
        raise ValueError(
            f"loss.custom: no loss {name!r}; there are: {names}. "
            "A file that calls register_loss is loaded with plugins=[path.py]"
        )
    return _registered[name]
