"""What megatron-core takes from Apex or Transformer Engine, by torch where neither is there."""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import utils
from megatron.core.optimizer import clip_grads
from megatron.core.tensor_parallel import layers
from torch import Tensor

from sft_fast.kernels.head_gradient import add_product_


class Products:
    """Gradients of weights that their product adds to the fp32 buffers itself.

    megatron's own are rounded to 16 bits and added afterwards: 14 bytes a weight and micro-batch
    instead of 8.
    """

    @staticmethod
    def wgrad_gemm_accum_fp32(x: Tensor, grad: Tensor, main_grad: Tensor) -> None:
        """main_grad [out, in] fp32 += grad [tokens, out] transposed @ x [tokens, in]."""
        add_product_(main_grad, grad.t(), x)

    wgrad_gemm_accum_fp16 = wgrad_gemm_accum_fp32


def total_norm(
    chunk_size: int, overflow: Tensor, tensors: Sequence[list[Tensor]], *args: Any
) -> tuple[Tensor, None]:
    """The norm [1] of all tensors of the first list; megatron's waits for that of each of them."""
    return torch.nn.utils.get_total_norm(tensors[0]).view(1), None


def scale_in_place(
    chunk_size: int, overflow: Tensor, tensors: Sequence[list[Tensor]], scale: float
) -> None:
    """Multiplies the tensors of both lists, which are the same; megatron's makes copies."""
    torch._foreach_mul_(tensors[0], scale)


def provide_products() -> None:
    """Makes megatron's `gradient_accumulation_fusion` work."""
    module: Any = layers
    if not module._grad_accum_fusion_available:
        module.fused_weight_gradient_mlp_cuda = Products
        module._grad_accum_fusion_available = True


def provide_clipping() -> None:
    """Makes megatron's norm and clipping of gradients one pass each, without waiting."""
    module: Any = clip_grads
    if module.l2_norm_impl is utils.local_multi_tensor_l2_norm:
        module.l2_norm_impl, module.multi_tensor_scale_impl = total_norm, scale_in_place
