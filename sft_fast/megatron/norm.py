"""RMSNorm for megatron-core layer specs, without Transformer Engine or Apex."""

import torch
from torch import Tensor, nn

from sft_fast.kernels import block_torch
from sft_fast.kernels.block_backends import BlockKernels
from sft_fast.megatron.recompute import free_until_backward


class RMSNorm(nn.Module):
    """Root-mean-square norm whose gradient is reduced correctly under sequence parallelism.

    megatron-core's own torch norm refuses sequence parallelism; its gradient all-reduce only looks
    for the `sequence_parallel` flag on the weight, which is set here.

    With `config.layernorm_zero_centered_gamma` it multiplies by 1 + weight, in fp32 as Gemma does.

    Source: Zhang & Sennrich 2019, arXiv 1910.07467.
    """

    kernels: BlockKernels = block_torch

    def __init__(self, config: object, hidden_size: int, eps: float = 1e-5, **kwargs: object):
        super().__init__()
        self.eps = eps
        self.is_zero_centered = config.layernorm_zero_centered_gamma  # type: ignore[attr-defined]
        dtype, device = config.params_dtype, torch.cuda.current_device()  # type: ignore[attr-defined]
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., hidden_size] -> the same shape and dtype."""
        return self.kernels.rms_norm(hidden_states, self.weight, self.eps, self.is_zero_centered)


class ResidualNorm(RMSNorm):
    """Normalises the sum of its input and the residual, and hands the sum on."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Two [..., hidden_size] -> (norm of the sum, sum); without a residual of the input."""
        return self.kernels.add_rms_norm(
            hidden_states, residual, self.weight, self.eps, self.is_zero_centered
        )

    def free_until_backward(self, normed: Tensor, total: Tensor, result: Tensor) -> None:
        """Frees the norm, which the backward pass makes of the sum again.

        Args:
            normed: [..., hidden_size], the norm that `forward` returned.
            total: [..., hidden_size], the sum that it returned.
            result: of the products that read the norm.
        """
        kept = total.detach()

        def write(out: Tensor) -> None:
            how = self.weight.detach(), self.eps, self.is_zero_centered
            self.kernels.write_rms_norm(out, kept, *how)

        free_until_backward(normed, write, result)


class NormThenAdd(RMSNorm):
    """Normalises what a block computed before it is added to the residual.

    It stands where megatron-core has its function of bias, dropout and addition.
    """

    def forward(self, output: Tensor, residual: Tensor) -> Tensor:  # type: ignore[override]
        """Two [..., hidden_size] -> the sum."""
        return self.kernels.rms_norm_add(
            output, residual, self.weight, self.eps, self.is_zero_centered
        )


class HeadNorm(RMSNorm):
    """The norm of the queries or the keys, which the kernel of the rotation computes.

    Calling it gives the weight, so that DDP's parameter-gather hooks fire.
    """

    def forward(self) -> Tensor:  # type: ignore[override]
        """[head_dim]"""
        return self.weight
