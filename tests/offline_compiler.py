"""What the compilers make of a Triton kernel for a GPU that is not there."""

import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

TARGETS = {
    "sm_90": ("cuda", 90, 32),
    "gfx942": ("hip", "gfx942", 64),
    "gfx950": ("hip", "gfx950", 64),
}
SPILL_COUNTERS = ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")


class Usage(NamedTuple):
    """Resources of a kernel without spills."""

    registers: int
    """of a thread; vector registers on CDNA"""
    shared_bytes: int
    residence: str
    """how many warps a multiprocessor, or waves a SIMD, can hold of it and of any kernel"""


def compile_for(
    kernel: Any,
    target: tuple[str, str | int, int],
    types: dict[str, str],
    constants: dict[str, Any],
    divisible: tuple[str, ...],
    num_warps: int,
    **options: int,
) -> Any:
    """Compiles with arguments whose names end so divisible by 16; those without a type are i32."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    variables = (argument for argument in names if argument not in constants)
    aligned = [argument for argument in variables if argument.endswith(divisible)]
    source = ASTSource(
        kernel,
        {argument: types.get(argument, "i32") for argument in names},
        {argument: value for argument, value in constants.items() if argument in names},
        {(names.index(argument),): [["tt.divisibility", 16]] for argument in aligned},
    )
    options |= {"num_warps": num_warps}
    return triton.compile(source, target=GPUTarget(*target), options=options)


def usage_without_spills(compiled: Any, folder: Path) -> Usage:
    """Fails if a register of the compiled kernel is spilled to memory."""
    shared = int(compiled.metadata.shared)
    if "amdgcn" in compiled.asm:
        assembly = compiled.asm["amdgcn"]
        for counter in SPILL_COUNTERS:
            assert re.findall(rf"\.{counter}:\s*(\d+)", assembly) == ["0"], counter
        registers = int(re.findall(r"\.vgpr_count:\s*(\d+)", assembly)[0])
        waves = min(8, 512 // (-(-registers // 8) * 8))
        return Usage(registers, shared, f"{waves}/8 waves")
    text = resource_usage(compiled, folder)
    assert re.findall(r"(?:STACK|LOCAL):(\d+)", text) == ["0", "0"], "registers were spilled"
    registers = int(re.findall(r"REG:(\d+)", text)[0])
    threads = 32 * compiled.metadata.num_warps
    blocks = min(2048 // threads, 65536 // (-(-registers // 8) * 8 * threads), 32)
    return Usage(registers, shared, f"{blocks * threads // 32}/64 warps")


def resource_usage(compiled: Any, folder: Path) -> str:
    """What cuobjdump says of a compiled kernel's registers and stack."""
    import triton

    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def loads_16_bytes(compiled: Any) -> bool:
    if "amdgcn" in compiled.asm:
        return bool(re.search(r"(global|buffer)_load_dwordx4", compiled.asm["amdgcn"]))
    return bool(re.search(r"ld\.global\S*\.v4\.b32", compiled.asm["ptx"]))


def stores_16_bytes(compiled: Any) -> bool:
    if "amdgcn" in compiled.asm:
        return bool(re.search(r"(global|buffer)_store_dwordx4", compiled.asm["amdgcn"]))
    return bool(re.search(r"st\.global\S*\.v4\.b32", compiled.asm["ptx"]))
