"""Gradients of weights that their product adds to the fp32 buffers itself, where Apex is absent.

Otherwise the product is rounded to 16 bits and added afterwards: 14 bytes a weight and micro-batch
instead of 8.
"""

from typing import Any

from megatron.core.tensor_parallel import layers
from torch import Tensor

from sft_fast.kernels.head_gradient import add_product_


class Products:
    """What megatron's linear layers call of Apex's extension."""

    @staticmethod
    def wgrad_gemm_accum_fp32(x: Tensor, grad: Tensor, main_grad: Tensor) -> None:
        """main_grad [out, in] fp32 += grad [tokens, out] transposed @ x [tokens, in]."""
        add_product_(main_grad, grad.t(), x)

    wgrad_gemm_accum_fp16 = wgrad_gemm_accum_fp32


def provide_products() -> None:
    """Makes megatron's `gradient_accumulation_fusion` work without Apex."""
    module: Any = layers
    if not module._grad_accum_fusion_available:
        module.fused_weight_gradient_mlp_cuda = Products
        module._grad_accum_fusion_available = True
