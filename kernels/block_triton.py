"""The kernels of a transformer layer in Triton, as block_torch documents them."""

from triton.errors import TritonError

from sft_fast.kernels.gated_activation_triton import gated_activation, write_gated_activation
from sft_fast.kernels.rms_norm_triton import add_rms_norm, rms_norm, rms_norm_add, write_rms_norm
from sft_fast.kernels.rotary_triton import rotate_qkv

__all__ = [
    "ERRORS",
    "add_rms_norm",
    "gated_activation",
    "rms_norm",
    "rms_norm_add",
    "rotate_qkv",
    "write_gated_activation",
    "write_rms_norm",
]

ERRORS = (TritonError,)
"""What the compiler and the launcher raise of their own."""
