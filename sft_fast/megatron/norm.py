"""RMSNorm for megatron-core layer specs, without Transformer Engine or Apex."""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

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


class WideNorm(nn.Module):
    """The norm of the queries or the keys over all heads, which tensor-parallel ranks share.

    Calling it gives this rank's weights, so that DDP's parameter-gather hooks fire.
    """

    def __init__(self, config: Any, width: int):
        """Args:
        config: megatron's.
        width: of all heads of this rank.
        """
        super().__init__()
        dtype, device = config.params_dtype, torch.cuda.current_device()
        self.weight = nn.Parameter(torch.ones(width, dtype=dtype, device=device))
        set_tensor_model_parallel_attributes(self.weight, True, 0, stride=1)

    def forward(self) -> Tensor:
        """[heads * head_dim] of this rank."""
        return self.weight

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """As megatron's modules have it; the weight is split by its rows."""
        state = self.state_dict(prefix="", keep_vars=True)
        sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            state, prefix, {"weight": 0}, sharded_offsets
        )
        return sharded


def norm_over_heads(
    qkv: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    num_groups: int,
    head_dim: int,
    eps: float,
    tp_group: dist.ProcessGroup,
) -> Tensor:
    """Queries and keys normalised over all heads of all tensor-parallel ranks.

    Args:
        qkv: [s, b, groups * (queries + 2) * head_dim], each group's queries, key and value.
        query_weight: [groups * queries * head_dim].
        key_weight: [groups * head_dim].
        num_groups: query groups of this rank.
        head_dim: channels of a head.
        eps: added to the mean square.
        tp_group: the ranks that share the heads.

    Returns:
        Like qkv.
    """
    heads = qkv.unflatten(2, (num_groups, -1, head_dim))
    *normed, values = heads.split([heads.shape[3] - 2, 1, 1], dim=3)
    sums = torch.stack([part.float().square().sum((2, 3, 4)) for part in normed])  # [2, s, b]
    sums = SumOverRanks.apply(sums, tp_group)
    for number, weight in enumerate((query_weight, key_weight)):
        part, width = normed[number], len(weight) * tp_group.size()
        scale = torch.rsqrt(sums[number] / width + eps)[:, :, None, None, None]
        normed[number] = (part.float() * scale).to(qkv.dtype) * weight.view(part.shape[2:])
    return torch.cat([*normed, values], dim=3).flatten(2)


class SumOverRanks(torch.autograd.Function):
    """(numbers of each rank, group) -> their sum; every rank computes something else with it."""

    @staticmethod
    def forward(ctx: Any, numbers: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Like numbers."""
        ctx.group = group
        return total_of(numbers, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """The gradients of all ranks, added up."""
        return total_of(grad, ctx.group), None


def total_of(numbers: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of what the ranks of a group have, in new memory."""
    if group.size() == 1:
        return numbers
    total = numbers.clone()
    dist.all_reduce(total, group=group)
    return total
