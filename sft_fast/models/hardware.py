"""GPUs by name: memory and arithmetic peak, from the makers' data sheets.

bf16_tflops is the dense matrix rate; where a sheet gives it with 2:4 sparsity, half of that.
Sources: AMD Instinct MI300X, MI325X and MI355X data sheets; NVIDIA H100 and H200 (SXM) data
sheets; NVIDIA HGX B200 data sheet (an eighth of the eight-GPU figures).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        memory_gb: of HBM, in 10^9 bytes.
        bf16_tflops: dense bf16 matrix products, 10^12 FLOP/s.
        bandwidth_tb_s: HBM, 10^12 bytes/s.
    """

    name: str
    memory_gb: float
    bf16_tflops: float
    bandwidth_tb_s: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("MI300X", 192, 1307.4, 5.3),
        Gpu("MI325X", 256, 1307.4, 6.0),
        Gpu("MI355X", 288, 2516.6, 8.0),
        Gpu("H100", 80, 989.4, 3.35),
        Gpu("H200", 141, 989.4, 4.8),
        Gpu("B200", 180, 2250.0, 8.0),
    )
}


def find_gpu(device_name: str) -> Gpu | None:
    """The GPU that a driver calls `device_name`, such as "AMD Instinct MI300X"; None: unknown."""
    words = device_name.upper().replace("_", " ").replace("-", " ").split()
    return next((gpu for name, gpu in GPUS.items() if name in words), None)
