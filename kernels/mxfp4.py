"""MXFP4: groups of 32 numbers of 4 bits that share a scale, a power of two.

A number is a sign, two bits of exponent and one of fraction (E2M1); a scale is the exponent alone,
plus 127 (E8M0). Two numbers lie in a byte, the first in the lower half.

Source: OCP Microscaling Formats (MX) Specification 1.0, 2023, sections 5.3.3, 5.4.1 and 6.
"""

import functools
import itertools
import math

import torch
from torch import Tensor

GROUP_SIZE = 32
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Of the codes 0 to 7; those from 8 on are the same below zero."""
LARGEST_SHARE, LARGEST_EXPONENT = 0.75, 3  # 6 = 0.75 * 2**3
BIAS, NAN_SCALE = 127, 255


def dequantise(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers of groups, exact in bf16 and fp32 up to their largest finite number.

    Args:
        blocks: uint8 [..., G, 16], two numbers a byte.
        scales: uint8 [..., G]; 255 makes NaN of a group.
        dtype: of the result.

    Returns:
        [..., 32 G]; what dtype cannot hold is rounded, or infinite.
    """
    assert blocks.shape == (*scales.shape, GROUP_SIZE // 2), (blocks.shape, scales.shape)
    pairs = number_pairs(blocks.device)[blocks.int()].flatten(-2)  # [..., G, 32]
    return pairs.mul_(powers(scales.device)[scales.int()].unsqueeze(-1)).flatten(-2).to(dtype)


def quantise(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest codes, of two the even one, under the smallest scale that clips no number.

    What `dequantise` gives comes back as the same numbers; a group whose largest code is below 4
    gets a smaller scale than it may have had.

    Args:
        numbers: floating [..., 32 G], finite in fp32.

    Returns:
        blocks uint8 [..., G, 16], scales uint8 [..., G].
    """
    groups = numbers.float().unflatten(-1, (-1, GROUP_SIZE))
    share, exponent = groups.abs().amax(-1).frexp()  # share is 0, or from 0.5 up to 1
    exponent = exponent - LARGEST_EXPONENT + (share > LARGEST_SHARE) + BIAS
    scales = exponent.masked_fill(share == 0, 0).clamp(0, NAN_SCALE - 1).to(torch.uint8)
    scaled = groups / powers(groups.device)[scales.int()].unsqueeze(-1)
    codes = torch.bucketize(scaled.abs(), bounds(groups.device), out_int32=True)
    codes += scaled.signbit() * len(MAGNITUDES)
    return (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8), scales


@functools.cache
def number_pairs(device: torch.device) -> Tensor:
    """fp32 [256, 2]: the two numbers of a byte."""
    numbers = torch.tensor([*MAGNITUDES, *(-each for each in MAGNITUDES)])
    return torch.stack([numbers.repeat(16), numbers.repeat_interleave(16)], dim=1).to(device)


@functools.cache
def powers(device: torch.device) -> Tensor:
    """fp32 [256]: what a scale multiplies with."""
    exact = [math.ldexp(1.0, scale - BIAS) for scale in range(NAN_SCALE)]
    return torch.tensor([*exact, math.nan], device=device)


@functools.cache
def bounds(device: torch.device) -> Tensor:
    """fp32 [7]: the largest number that is nearer to code i than to code i + 1, or as near where i
    is even."""
    halves = torch.tensor([sum(pair) / 2 for pair in itertools.pairwise(MAGNITUDES)])
    below = halves.nextafter(torch.zeros(()))
    return torch.where(torch.arange(len(halves)) % 2 == 0, halves, below).to(device)
