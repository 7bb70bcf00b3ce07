"""RMSNorm for megatron-core layer specs, without Transformer Engine or Apex."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional


class RMSNorm(nn.Module):
    """Root-mean-square norm whose gradient is reduced correctly under sequence parallelism.

    megatron-core's own torch norm refuses sequence parallelism; its gradient all-reduce only looks
    for the `sequence_parallel` flag on the weight, which is set here.

    With `config.layernorm_zero_centered_gamma` it multiplies by 1 + weight, in fp32 as Gemma does.

    Source: Zhang & Sennrich 2019, arXiv 1910.07467.
    """

    def __init__(self, config: object, hidden_size: int, eps: float = 1e-5, **kwargs: object):
        super().__init__()
        self.eps = eps
        self.is_zero_centered = config.layernorm_zero_centered_gamma  # type: ignore[attr-defined]
        dtype, device = config.params_dtype, torch.cuda.current_device()  # type: ignore[attr-defined]
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., hidden_size] -> the same shape and dtype."""
        shape = self.weight.shape
        if not self.is_zero_centered:
            return functional.rms_norm(hidden_states, shape, self.weight, self.eps)
        weight = 1.0 + self.weight.float()
        output = functional.rms_norm(hidden_states.float(), shape, weight, self.eps)
        return output.type_as(hidden_states)


class NormThenAdd(RMSNorm):
    """Normalises what a block computed before it is added to the residual.

    It stands where megatron-core has its function of bias, dropout and addition.
    """

    def forward(self, training: bool, fused: bool) -> Callable[..., Tensor]:  # type: ignore[override]
        """Returns the function of (output and bias of the block, residual, dropout)."""
        return self.add

    def add(
        self, output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float
    ) -> Tensor:
        """Normalises the output [s, b, h] and adds it to the residual, like it."""
        output, bias = output_with_bias
        assert bias is None and dropout == 0.0, "no family has them"
        return residual + super().forward(output)
