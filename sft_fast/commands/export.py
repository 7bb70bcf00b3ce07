"""`sft_fast export`: a Hugging Face model from a checkpoint, in one process."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from sft_fast.commands.arguments import Commands, add_run, positive
from sft_fast.commands.launch import ENGINE


def add(commands: Commands) -> None:
    export = commands.add_parser("export", help="write a Hugging Face model from a checkpoint")
    add_run(export)
    export.add_argument("--step", type=positive, help="of the checkpoint; default: the newest")
    export.add_argument("--to", type=Path, metavar="DIR", help="default: OUT/export_STEP")
    export.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="default: as trained")
    export.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    from sft_fast.config import load_config
    from sft_fast.run_files import read_run

    found = read_run(parsed.run_dir)
    steps = {int(path.name[5:]): path for path in found.checkpoints}
    if not steps or (parsed.step is not None and parsed.step not in steps):
        there = ", ".join(map(str, steps)) or "none"
        raise ValueError(f"{found.path} has no checkpoint of that step; there are: {there}")
    step = max(steps) if parsed.step is None else parsed.step
    target = parsed.to or found.path / f"export_{step}"
    if target.exists():
        raise ValueError(f"{target} exists; name another directory with --to")
    config = load_config(found.path / "config.yaml", [])
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export_") as work:
        # The model card tells what the run measured.
        shutil.copy(found.path / "metrics.jsonl", work)
        overrides = {
            "stage": "export",
            "output_dir": work,
            "data.cache_dir": str(config.data.cache_dir or found.path.absolute() / "data"),
            "checkpoint.resume": str(steps[step].absolute()),
            "model.transformer_impl": "local",
            "model.fp8": "none",
            "model.offload_layers": 0,
            "parallel.tensor": 1,
            "parallel.pipeline": 1,
            "parallel.virtual_pipeline": 1,
            "parallel.context": 1,
            "parallel.expert": 1,
            "parallel.expert_tensor": 1,
            "parallel.sequence": "false",
            "metrics.run_name": config.metrics.run_name or found.path.resolve().name,
        }
        if parsed.dtype is not None:
            overrides["export.dtype"] = parsed.dtype
        command = [sys.executable, str(ENGINE), "--config", str(found.path / "config.yaml")]
        command += [f"{key}={value}" for key, value in overrides.items()]
        print(f"exporting step {step} of {found.path}", flush=True)
        result = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
        if result.returncode != 0:
            print(result.stdout, end="")
            return result.returncode
        os.rename(Path(work) / "export", target)
    print(target)
    return 0
