"""What compilers make of the layer's kernels for absent GPUs: no spills, loads of 16 bytes.

`pytest tests/kernels/test_block_compiles.py -rP` prints the occupancy table.
"""

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from offline_compiler import (
    TARGETS,
    compile_for,
    loads_16_bytes,
    stores_16_bytes,
    usage_without_spills,
)

pytest.importorskip("triton")

MOST_REGISTERS = 128
"""They let 16 warps live on a Hopper multiprocessor, 4 waves on a SIMD of CDNA."""
MOST_SHARED_BYTES = 16384
"""For reductions, and for one change of layout as partial sums are stored."""


class Case(NamedTuple):
    kernel: Any
    constants: dict[str, Any]
    num_warps: int
    divisible: tuple[str, ...] = ("_ptr", "_stride", "num_columns")
    waves_per_eu: int | None = None


def norm_case(name: str, num_columns: int, warp_size: int) -> Case:
    """name: a form of the forward pass, or what the backward pass has to do."""
    from sft_fast.kernels import rms_norm_triton as kernels

    options = kernels.launch_options(num_columns, warp_size)
    options["ZERO_CENTERED"] = name in ("add_after", "trained")
    warps = options.pop("num_warps")
    if name in ("add_before", "add_after"):
        options |= {"ADD_BEFORE": name == "add_before", "ADD_AFTER": name == "add_after"}
        return Case(kernels.rms_norm_fwd_kernel, options, warps)
    is_trained = name == "trained"
    options |= {"WITH_TOTAL": True, "WITH_WEIGHT": is_trained}
    options |= {} if is_trained else {"partial_ptr": None}
    return Case(kernels.rms_norm_bwd_kernel, options, warps)


def rotary_case(name: str, layout: tuple[int, int, int, int], warp_size: int) -> Case:
    """layout: groups, queries per group, channels, of which half turn with another half."""
    from sft_fast.kernels import rotary_triton as kernels

    direction, has_norm = name.split("-")[0], name.endswith("norm")
    options = kernels.launch_options(*layout, warp_size)
    options |= {"HAS_NORM": has_norm, "WITH_WEIGHTS": has_norm, "ZERO_CENTERED": False}
    warps, waves = options.pop("num_warps"), options.pop("waves_per_eu", None)
    absent = () if has_norm else ("q_weight_ptr", "k_weight_ptr", "qkv_ptr", "partial_ptr")
    if direction == "fwd":
        absent = absent[:2]
    kernel = getattr(kernels, f"rotary_{direction}_kernel")
    return Case(kernel, options | dict.fromkeys(absent), warps, waves_per_eu=waves)


def gate_case(name: str, num_columns: int, warp_size: int) -> Case:
    from sft_fast.kernels import gated_activation_triton as kernels

    direction, kind, *scale = name.split("-")
    options: dict[str, Any] = dict(kernels.launch_options(num_columns, warp_size))
    warps = options.pop("num_warps")
    absent = () if scale else ("scale_ptr", "grad_scale_ptr")
    options |= {"KIND": kind, "HAS_SCALE": bool(scale)} | dict.fromkeys(absent)
    return Case(getattr(kernels, f"gated_activation_{direction}_kernel"), options, warps)


def sums_case(name: str, num_columns: int, warp_size: int) -> Case:
    from sft_fast.kernels import column_sums_triton as kernels

    blocks = {"BLOCK_ROWS": kernels.BLOCK_ROWS, "BLOCK_COLUMNS": kernels.BLOCK_COLUMNS}
    return Case(kernels.column_sums_kernel, blocks, kernels.NUM_WARPS)


FP32 = ("rstd_ptr", "partial_ptr", "cos_sin_ptr", "scale_ptr", "grad_scale_ptr", "total_ptr")
SHIPPED = [
    *((norm_case, name, 4096) for name in ("add_before", "frozen", "trained")),
    *((norm_case, name, 5376) for name in ("add_after", "trained")),
    (norm_case, "trained", 8192),
    *((rotary_case, name, (8, 4, 128, 64)) for name in ("fwd-", "bwd-", "fwd-norm", "bwd-norm")),
    *((rotary_case, name, (8, 3, 128, 48)) for name in ("fwd-", "bwd-norm")),  # Phi-4
    (rotary_case, "bwd-norm", (8, 12, 128, 32)),  # GLM-4.5
    (rotary_case, "bwd-norm", (4, 2, 256, 128)),  # Gemma 3
    *((gate_case, f"{name}-silu", 14336) for name in ("fwd", "bwd")),
    *((gate_case, f"{name}-gelu_tanh-scale", 768) for name in ("fwd", "bwd")),
    (gate_case, "bwd-clamped_silu-scale", 2880),
    (sums_case, "sums", 4096),
]


def compile_case(case: Case, target: tuple[str, str | int, int], dtype: str) -> Any:
    names = case.kernel.arg_names
    types = {name: f"*{dtype}" for name in names if name.endswith("_ptr")}
    is_norm = "rms_norm" in case.kernel.__name__
    fp32 = [name for name in FP32 if name != "total_ptr" or not is_norm]
    types |= {name: "*fp32" for name in fp32} | {"eps": "fp32"}
    types |= dict.fromkeys(case.constants, "constexpr")
    arguments = types, case.constants, case.divisible, case.num_warps
    hints = {} if case.waves_per_eu is None else {"waves_per_eu": case.waves_per_eu}
    return compile_for(case.kernel, target, *arguments, **hints)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("make_case", "name", "shape", "dtype"),
    [
        pytest.param(*shipped, dtype, marks=() if dtype == "bf16" else pytest.mark.slow)
        for shipped in SHIPPED
        for dtype in ("bf16", "fp16", "fp32")
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
@pytest.mark.usefixtures("compiler")
def test_compiles_without_spills(
    make_case: Any, name: str, shape: Any, dtype: str, target: str, tmp_path: Path
) -> None:
    case = make_case(name, shape, TARGETS[target][2])
    compiled = compile_case(case, TARGETS[target], dtype)
    usage = usage_without_spills(compiled, tmp_path)
    print(f"{target:>6} {case.kernel.__name__:>28} {name:>24} {dtype:>4} {shape!s:>16} {usage}")
    assert usage.registers <= MOST_REGISTERS and usage.shared_bytes <= MOST_SHARED_BYTES
    assert loads_16_bytes(compiled)
    assert stores_16_bytes(compiled) or make_case is sums_case
    if "ptx" in compiled.asm and dtype == "bf16" and make_case is not sums_case:
        assert "cvt.rn.bf16" in compiled.asm["ptx"], "not rounded to nearest"


@pytest.mark.parametrize(
    ("make_case", "name", "shape"),
    [
        (norm_case, "trained", 1),
        (norm_case, "add_before", 1),
        (rotary_case, "bwd-norm", (1, 1, 2, 1)),
        (rotary_case, "fwd-", (1, 1, 2, 0)),
        (gate_case, "bwd-silu-scale", 1),
        (sums_case, "sums", 1),
    ],
)
@pytest.mark.usefixtures("compiler")
def test_compiles_where_every_number_is_one(make_case: Any, name: str, shape: Any) -> None:
    """Triton makes an integer argument of 1 a Python number: one token, one channel, one row."""
    case = make_case(name, shape, 32)
    floats = ("eps",)
    numbers = [
        argument
        for argument in case.kernel.arg_names
        if not argument.endswith("_ptr") and not argument.isupper() and argument not in floats
    ]
    ones = {argument: 1 for argument in numbers}
    compile_case(
        case._replace(constants=case.constants | ones, divisible=()), TARGETS["sm_90"], "bf16"
    )
