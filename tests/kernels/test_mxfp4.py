"""MXFP4 against its oracle: every byte under every scale, every tie, and the way back."""

import math

import pytest
import torch
from torch import Tensor

from sft_fast.kernels.mxfp4 import dequantise, quantise
from sft_fast.reference import mxfp4 as oracle

NUMBERS = [*range(16)]


def every_byte_and_scale() -> tuple[Tensor, Tensor]:
    """blocks [255, 16, 16], scales [255, 16]: all bytes under each scale that is one."""
    blocks = torch.arange(256, dtype=torch.uint8).view(16, 16).expand(255, 16, 16)
    return blocks.contiguous(), torch.arange(255, dtype=torch.uint8)[:, None].repeat(1, 16)


def test_the_oracle_has_the_numbers_of_the_specification() -> None:
    expected = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert [float(oracle.number_of(code, 127)) for code in range(8)] == expected
    assert [float(oracle.number_of(code, 127)) for code in range(8, 16)] == [-x for x in expected]
    assert oracle.number_of(1, 0) == math.ldexp(1.0, -128)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_byte_under_every_scale_is_exact(dtype: torch.dtype) -> None:
    blocks, scales = every_byte_and_scale()
    found = dequantise(blocks, scales, dtype)
    assert found.dtype == dtype and found.shape == (255, 512)
    numbers = [[oracle.number_of(code, scale) for code in NUMBERS] for scale in range(255)]
    largest = math.ldexp(1.0, 128)  # from here on fp32 is infinite
    table = torch.tensor(
        [
            [math.copysign(math.inf, x) if abs(x) >= largest else float(x) for x in row]
            for row in numbers
        ],
        dtype=torch.float64,
    )
    of_byte = torch.tensor([code for byte in range(256) for code in (byte & 15, byte >> 4)])
    assert found.double().equal(table[:, of_byte])


def test_a_scale_that_is_none_makes_nan() -> None:
    blocks = torch.zeros(1, 16, dtype=torch.uint8)
    assert dequantise(blocks, torch.tensor([255], dtype=torch.uint8), torch.float32).isnan().all()


def test_transformers_reads_the_same_numbers() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = every_byte_and_scale()
    blocks, scales = blocks[1:253], scales[1:253]  # it has no subnormal scale, and no infinity
    theirs = convert_moe_packed_tensors(blocks.unsqueeze(1), scales.unsqueeze(1))
    assert dequantise(blocks, scales, torch.bfloat16).equal(theirs.squeeze(2))


def test_what_was_dequantised_comes_back() -> None:
    blocks, scales = every_byte_and_scale()
    finite = scales[:, 0] < 253
    numbers = dequantise(blocks[finite], scales[finite], torch.bfloat16)
    again, own = quantise(numbers)
    assert dequantise(again, own, torch.bfloat16).equal(numbers)
    # Each of these groups has a code from 4 on, and then its scale is the only one.
    full = torch.randint(256, (99, 16), dtype=torch.uint8, generator=torch.Generator())
    full[:, 0] = 0xF4
    scale = torch.arange(100, 199, dtype=torch.uint8)
    assert all(map(torch.equal, quantise(dequantise(full, scale, torch.float32)), (full, scale)))


def cases() -> list[Tensor]:
    """Groups [32] of every size, with ties, zeros of both signs, and numbers beside the bounds."""
    generator = torch.Generator().manual_seed(0)
    groups = [torch.randn(32, generator=generator) * 2.0**e for e in range(-140, 120, 13)]
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    beside = [ties, ties.nextafter(torch.zeros(())), ties.nextafter(torch.tensor(9.0)), -ties]
    groups.append(torch.cat(beside).clamp(max=6.0))
    groups.append(torch.zeros(32))
    groups.append(torch.full((32,), torch.finfo(torch.float32).max))
    groups.append(torch.full((32,), 6.0).nextafter(torch.tensor(9.0)))
    return groups


def test_the_nearest_code_is_chosen() -> None:
    groups = cases()
    blocks, scales = quantise(torch.stack(groups))
    for group, block, scale in zip(groups, blocks[:, 0].tolist(), scales[:, 0], strict=True):
        codes = [code for byte in block for code in (byte & 15, byte >> 4)]
        assert (codes, int(scale)) == oracle.quantise(group.tolist())
