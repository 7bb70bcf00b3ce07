"""`sft_fast env`: what a bug report needs."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from importlib import util
from typing import get_args

from sft_fast.commands.arguments import Commands
from sft_fast.metrics.choices import TrackerName
from sft_fast.models.choices import AttentionBackend
from sft_fast.runtime.versions import installed_version

PACKAGES = (
    *("sft-fast", "torch", "megatron-core", "transformers", "datasets", "tokenizers"),
    *("safetensors", "numpy", "pydantic", "triton", "matplotlib"),
    # Attention kernels and trackers have the names of their packages; those of torch have none.
    *(name.replace("_", "-") for name in (*get_args(AttentionBackend), *get_args(TrackerName))),
)
VARIABLES = (
    *("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "OMP_NUM_THREADS"),
    *("NCCL_DEBUG", "NCCL_SOCKET_IFNAME", "TRITON_CACHE_DIR", "HF_HUB_OFFLINE"),
)


def add(commands: Commands) -> None:
    """Describes `env` to argparse."""
    parser = commands.add_parser("env", help="print versions and devices, for a bug report")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> None:
    """Prints a line for each version, device and variable."""
    from sft_fast.redact import redact

    for name, value in lines():
        print(f"{name:<22}{redact(value)}")


def lines() -> list[tuple[str, str]]:
    """(name, value) of everything that is worth telling."""
    found = [
        ("python", f"{platform.python_version()}  {sys.executable}"),
        ("system", f"{platform.platform()}, {os.cpu_count()} cores"),
    ]
    found += [(name, version) for name in PACKAGES if (version := installed_version(name))]
    for name in ("_C", "_gpu"):
        is_built = util.find_spec(f"sft_fast.{name}") is not None
        found.append((f"sft_fast.{name}", "built" if is_built else "not built"))
    found += devices()
    return found + [(name, os.environ[name]) for name in VARIABLES if name in os.environ]


def devices() -> list[tuple[str, str]]:
    """(name, value) of the GPU runtime and of each GPU."""
    import torch

    runtime = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    found = [("GPU runtime of torch", runtime if torch.cuda.is_available() else "none in use")]
    for number in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(number)
        architecture = getattr(device, "gcnArchName", f"sm_{device.major}{device.minor}")
        memory = device.total_memory / 2**30
        found.append((f"GPU {number}", f"{device.name} ({architecture}), {memory:.0f} GiB"))
    return found
