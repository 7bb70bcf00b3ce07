"""What compilers make of the experts' kernels for absent GPUs: no spills, the matrix units.

`pytest tests/kernels/test_experts_compile.py -rP` prints the table of registers.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from offline_compiler import (
    TARGETS,
    compile_for,
    loads_16_bytes,
    stores_16_bytes,
    usage_without_spills,
)

pytest.importorskip("triton")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHARED_BYTES = {"sm_90": 232448, "gfx942": 65536, "gfx950": 163840}
MATRIX_UNITS = {"ptx": "wgmma.mma_async", "amdgcn": "v_mfma"}
WIDTHS = ("num_outputs", "num_inputs", "width", "_stride", "_ptr")
SHIPPED = [
    pytest.param(
        name, dtype, even, marks=() if (dtype, even) == ("bf16", True) else pytest.mark.slow
    )
    for name in ("forward", "backward", "added", "outer", "outer-rows", "outer-new")
    for dtype in DTYPES
    for even in (True, False)
]


def compile_product(name: str, target: str, dtype: str, even: bool) -> Any:
    """forward, added and backward: which dimension of a matrix is contiguous."""
    from sft_fast.kernels import grouped_matmul_triton as kernels

    backend, _, _ = TARGETS[target]
    is_outer = name.startswith("outer")
    config = kernels.tile_config(DTYPES[dtype], is_outer, backend == "hip", SHARED_BYTES[target])
    constants: dict[str, Any] = {"PRECISION": "ieee", "IS_EVEN": even}
    if is_outer:
        constants |= kernels.outer_options(config, has_rows=name == "outer-rows")
        constants |= {"HAS_ROWS": name == "outer-rows", "ACCUMULATE": name != "outer-new"}
    else:
        constants |= kernels.product_options(config)
        constants |= {"BLOCK_GROUPS": 128, "ACCUMULATE": name == "added"}
        constants["output_stride" if name == "backward" else "input_stride"] = 1
    options = {key: constants.pop(key) for key in ("num_warps", "num_stages")}
    types = dict.fromkeys(("y_ptr", "x_ptr", "matrices_ptr", "grad_ptr"), f"*{dtype}")
    types |= {"offsets_ptr": "*i32", "rows_ptr": "*i32", "group_stride": "i64"}
    types |= {"total_ptr": f"*{dtype}" if name == "outer-new" else "*fp32"}
    types |= dict.fromkeys(constants, "constexpr")
    kernel = kernels.grouped_outer_product_kernel if is_outer else kernels.grouped_matmul_kernel
    return compile_for(kernel, TARGETS[target], types, constants, WIDTHS, **options)


@pytest.mark.parametrize(("name", "dtype", "even"), SHIPPED)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.usefixtures("compiler")
def test_products_compile_without_spills(
    name: str, dtype: str, even: bool, target: str, tmp_path: Path
) -> None:
    compiled = compile_product(name, target, dtype, even)
    usage = usage_without_spills(compiled, tmp_path)
    print(f"{target:>6} {name:>10} {dtype:>4} {'even' if even else 'odd':>4} {usage}")
    assert usage.shared_bytes <= SHARED_BYTES[target]
    if dtype != "fp32":
        kind = "ptx" if "ptx" in compiled.asm else "amdgcn"
        assert MATRIX_UNITS[kind] in compiled.asm[kind]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["scatter_copies_kernel", "sum_copies_kernel"])
@pytest.mark.parametrize("width", [2048, 4096, 768])
@pytest.mark.usefixtures("compiler")
def test_copies_compile_without_spills(width: int, name: str, target: str, tmp_path: Path) -> None:
    from sft_fast.kernels import expert_copies_triton as kernels

    constants = {"NUM_COPIES": 8, **kernels.launch_options(width, TARGETS[target][2])}
    options = {"num_warps": constants.pop("num_warps")}
    types = dict.fromkeys(("rows_ptr", "x_ptr", "sums_ptr"), "*bf16") | {"places_ptr": "*i32"}
    types |= dict.fromkeys(constants, "constexpr")
    arguments = types, constants, WIDTHS
    compiled = compile_for(getattr(kernels, name), TARGETS[target], *arguments, **options)
    usage_without_spills(compiled, tmp_path)
    assert loads_16_bytes(compiled) and stores_16_bytes(compiled)


@pytest.mark.parametrize(
    ("dtype", "is_amd", "shared_bytes"),
    [(torch.bfloat16, False, 101376), (torch.bfloat16, False, 166912), (torch.float32, True, 0)],
)
@pytest.mark.parametrize("is_outer", [True, False])
def test_tiles_fit_smaller_gpus(
    dtype: torch.dtype, is_amd: bool, shared_bytes: int, is_outer: bool
) -> None:
    from sft_fast.kernels.grouped_matmul_triton import FP32, tile_config

    config = tile_config(dtype, is_outer, is_amd, shared_bytes)
    assert config == FP32 or config.shared_bytes(dtype) <= shared_bytes
