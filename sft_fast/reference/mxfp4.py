"""Oracles of MXFP4, one number after the other in exact fractions.

Source: OCP Microscaling Formats (MX) Specification 1.0, 2023, sections 5.3.3, 5.4.1 and 6.
"""

from collections.abc import Sequence
from fractions import Fraction


def number_of(code: int, scale: int) -> Fraction:
    """What the 4 bits of a code mean under a scale from 0 to 254."""
    sign, exponent, fraction = code >> 3, code >> 1 & 3, code & 1
    # Exponent 0 has no hidden bit.
    magnitude = (
        Fraction(fraction, 2)
        if exponent == 0
        else (1 + Fraction(fraction, 2)) * (Fraction(2) ** (exponent - 1))
    )
    return (-1) ** sign * magnitude * Fraction(2) ** (scale - 127)


def dequantise(block: Sequence[int], scale: int) -> list[Fraction]:
    """The 32 numbers of 16 bytes; the lower half of a byte comes first."""
    return [number_of(code, scale) for byte in block for code in (byte & 15, byte >> 4)]


def quantise(numbers: Sequence[float]) -> tuple[list[int], int]:
    """The codes of the nearest numbers, ties to an even code, and the smallest scale that clips
    none of them."""
    exact = [abs(Fraction(number)) for number in numbers]
    scale = next(scale for scale in range(255) if number_of(7, scale) >= max(exact))
    codes = [min(range(8), key=lambda code: distance(code, scale, each)) for each in exact]
    signs = [str(number).startswith("-") for number in numbers]
    return [code + 8 * sign for code, sign in zip(codes, signs, strict=True)], scale


def distance(code: int, scale: int, number: Fraction) -> tuple[Fraction, int]:
    """How far a code is from a number; of two that are as far, the even one comes first."""
    return abs(number_of(code, scale) - number), code % 2
