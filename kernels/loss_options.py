"""What the config's section `loss` may say: backends, policies, and the options of a token's loss.

Imports no torch, because the config imports it.
"""

import functools
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

LossBackend = Literal["auto", "triton", "native", "torch"]
"""Value of `loss.backend`: a backend of masked_cross_entropy, or the choice among them."""

Policy = Literal["auto", "stored", "gradient_in_forward", "recompute"]
"""Value of `loss.policy`, see HeadSettings; the order is that in which `auto` tries them."""


class LossOptions(BaseModel):
    """What the loss of a token is, beyond -log p(label). An option that is 0 is off.

    Each option is a key of the config's section `loss` too. It is declared here and computed by the
    oracle and by each backend's device code; nothing between them names it.

    Raises:
        ValueError: an option outside its range.

    Source: label smoothing, Szegedy et al. 2015 (arXiv 1512.00567); z-loss, Chowdhery et al. 2022
        (arXiv 2204.02311); softcap, Gemma 2 (arXiv 2408.00118).
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target spread evenly over the vocabulary."""
    z_loss: Annotated[float, Field(ge=0)] = 0.0
    """Factor of log(sum(exp(logits)))**2, added to the loss."""
    logit_softcap: Annotated[float, Field(ge=0)] = 0.0
    """Bound c of the logits c * tanh(logits / c), for models trained with one; 0 = none."""

    def values(self) -> list[float]:
        """All options in their order: the form that crosses custom operators and module _gpu."""
        return [getattr(self, name) for name in OPTION_NAMES]

    def without_penalties(self) -> "LossOptions":
        """Only what changes the logits themselves: the loss is then -log p(label)."""
        return LossOptions(logit_softcap=self.logit_softcap)

    def penalties(self) -> list[str]:
        """Names of the options in use that without_penalties drops."""
        plain = self.without_penalties()
        return [name for name in OPTION_NAMES if getattr(self, name) != getattr(plain, name)]

    def num_statistics(self, with_outputs: bool) -> int:
        """Numbers that LossKernels.shard_statistics collects of a token."""
        return 3 + (self.label_smoothing > 0) + 2 * with_outputs


OPTION_NAMES = tuple(LossOptions.model_fields)


@functools.cache
def options_of(values: tuple[float, ...]) -> LossOptions:
    """The inverse of LossOptions.values. Cached: it runs in every launch of a custom operator."""
    return LossOptions(**dict(zip(OPTION_NAMES, values, strict=True)))
