"""Times the layer's Triton kernels over launch shapes: what their constants were chosen from.

    python benchmarks/tune_block_launch.py [case...]

Prints for each case of bench_block_kernels.py, forward and backward, the best launches and the one
that ships, as fractions of a large copy's bytes per second.
"""

import itertools
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench_block_kernels import CASES, DTYPE, Case, contender, make_inputs
from sft_fast.kernels import (
    column_sums_triton,
    gated_activation_triton,
    rms_norm_triton,
    rotary_triton,
)
from timing import DEVICE, copy_bytes_per_s, graph_median_s

NUM_BEST = 4
Launch = dict[str, int]

CHOICES: dict[ModuleType, list[dict[str, list[int]]]] = {
    rms_norm_triton: [
        {"ELEMENTS_PER_THREAD": [8, 16, 32]},
        {"MAX_PROGRAMS": [132, 264, 396, 512, 1056, 2112]},
    ],
    rotary_triton: [
        {
            "ELEMENTS_PER_PROGRAM": [1024, 2048, 4096, 8192],
            "ELEMENTS_PER_THREAD": [8, 16, 32],
        },
        {"MAX_PROGRAMS": [64, 128, 256, 512, 1024]},
    ],
    gated_activation_triton: [
        {"BLOCK_COLUMNS": [512, 1024, 2048, 4096], "ELEMENTS_PER_THREAD": [8, 16]}
    ],
    column_sums_triton: [
        {"BLOCK_ROWS": [32, 64, 128], "BLOCK_COLUMNS": [16, 32, 64], "NUM_WARPS": [4, 8]}
    ],
}
"""Each is tried with all others as they ship."""


def main() -> None:
    ceiling = copy_bytes_per_s()
    print(f"copy {ceiling / 1e12:.2f} TB/s")
    with torch.device(DEVICE):
        for name in sys.argv[1:] or CASES:
            tune(name, CASES[name](), ceiling)
        tune_sums(ceiling)


def module_of(name: str) -> ModuleType:
    if name.startswith("norm"):
        return rms_norm_triton
    is_heads = name.startswith(("rotary", "QK"))
    return rotary_triton if is_heads else gated_activation_triton


def launches(module: ModuleType) -> Iterator[Launch]:
    """What ships, then everything else that is worth a try."""
    names = [name for choices in CHOICES[module] for name in choices]
    shipped = {name: getattr(module, name) for name in names}
    yield shipped
    for choices in CHOICES[module]:
        for values in itertools.product(*choices.values()):
            launch = shipped | dict(zip(choices, values, strict=True))
            if launch != shipped:
                yield launch


def tune(name: str, case: Case, ceiling: float) -> None:
    module = module_of(name)
    step, inputs = contender("Triton", case), make_inputs(case, case.num_tokens)
    # An autograd graph that lives on would tie its leaves to this stream.
    with torch.no_grad():
        outputs = step(*inputs)
    upstream = [torch.randn_like(each) for each in as_tuple(outputs)]
    element = case.num_tokens * DTYPE.itemsize

    def forward() -> None:
        with torch.no_grad():
            step(*inputs)

    def both() -> None:
        torch.autograd.grad(step(*inputs), inputs, upstream, allow_unused=True)

    forward_limit = element * case.forward_numbers / ceiling
    backward_limit = element * case.backward_numbers / ceiling
    found_forward, found_backward = [], []
    for launch in launches(module):
        with mock.patch.multiple(module, **launch):
            forward_s = graph_median_s(forward)
            both_s = graph_median_s(both)
        found_forward.append((forward_limit / forward_s, launch))
        found_backward.append((backward_limit / (both_s - forward_s), launch))
    show(f"{name} forward", found_forward)
    show(f"{name} backward", found_backward)


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def show(what: str, found: list[tuple[float, Launch]]) -> None:
    print(f"{what}: shipped {found[0][0]:.3f} {found[0][1]}", flush=True)
    best = sorted(found, key=lambda each: -each[0])
    for share, launch in (*best[:NUM_BEST], best[-1]):
        print(f"    {share:.3f} {launch}")


def tune_sums(ceiling: float) -> None:
    """The second kernel of a weight's gradient, in microseconds."""
    for rows, columns in ((512, 4096), (512, 8192), (768, 128)):
        partial, total = torch.randn(rows, columns), torch.zeros(columns)
        limit_us = 1e6 * 4 * rows * columns / ceiling
        print(f"sums of {rows} x {columns}: limit {limit_us:.1f} us")
        for launch in launches(column_sums_triton):
            with mock.patch.multiple(column_sums_triton, **launch):
                duration = graph_median_s(
                    lambda total=total, partial=partial: column_sums_triton.add_column_sums(
                        total, partial
                    )
                )
            print(f"    {1e6 * duration:.1f} us {launch}")


if __name__ == "__main__":
    main()
