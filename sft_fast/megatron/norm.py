"""RMSNorm for megatron-core layer specs, without Transformer Engine or Apex."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class RMSNorm(nn.Module):
    """Root-mean-square norm whose gradient is reduced correctly under sequence parallelism.

    megatron-core's own torch norm refuses sequence parallelism; its gradient all-reduce only looks
    for the `sequence_parallel` flag on the weight, which is set here.

    Source: Zhang & Sennrich 2019, arXiv 1910.07467.
    """

    def __init__(self, config: object, hidden_size: int, eps: float = 1e-5, **kwargs: object):
        super().__init__()
        self.eps = eps
        dtype, device = config.params_dtype, torch.cuda.current_device()  # type: ignore[attr-defined]
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., hidden_size] -> the same shape and dtype."""
        return functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.eps)
