"""`sft_fast train`: starts torchrun with the right number of processes."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sft_fast.commands.arguments import Commands, add_config, config_path, not_negative, positive

if TYPE_CHECKING:
    from sft_fast.config.sections import ParallelConfig

TRAIN_SCRIPT = Path(__file__).parents[1] / "train.py"
# Handed to torchrun as they are.
TORCHRUN_FLAGS = {
    "--nnodes": "machines; for more than one run the same command on each",
    "--node-rank": "number of this machine, from 0",
    "--master-addr": "address of machine 0",
    "--master-port": "free port of machine 0",
    "--rdzv-backend": "rendezvous backend, e.g. c10d",
    "--rdzv-endpoint": "rendezvous host:port",
    "--rdzv-id": "name of the job",
    "--max-restarts": "how often all ranks are started again after one died",
}
WHOLE_NUMBERS = ("--node-rank", "--master-port", "--max-restarts")


def add(commands: Commands) -> None:
    """Describes `train` to argparse."""
    train = commands.add_parser("train", help="train, evaluate, export")
    add_config(train)
    train.add_argument(
        "--nproc-per-node",
        type=positive,
        metavar="N",
        help="processes on this machine; default: one per GPU, without GPUs as few as fit",
    )
    for flag, meaning in TORCHRUN_FLAGS.items():
        kind = not_negative if flag in WHOLE_NUMBERS else str
        train.add_argument(flag, metavar="X", type=kind, help=meaning)
    train.add_argument(
        "--allow-change",
        metavar="FIELD,...",
        help="resume although these differ from the checkpoint",
    )
    train.add_argument("--dry-run", action="store_true", help="print the torchrun command")
    train.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> None:
    """Becomes the launcher of the ranks, or prints its command line."""
    from sft_fast.config.layout import check_world_size
    from sft_fast.config.schema import load_config
    from sft_fast.preflight.machine_checks import require_data
    from sft_fast.runtime.run_directory import check_output_dir
    from sft_fast.runtime.run_files import check_resume

    path = config_path(parsed)
    config = load_config(path, parsed.overrides)
    if not parsed.dry_run:
        # Before torch is imported, which takes seconds.
        require_data(config.data)
        check_resume(config.checkpoint.resume, Path(config.output_dir))
        check_output_dir(Path(config.output_dir))
    processes = parsed.nproc_per_node or default_processes(config.parallel)
    given = {flag: getattr(parsed, flag[2:].replace("-", "_")) for flag in TORCHRUN_FLAGS}
    nodes = given["--nnodes"] or "1"
    # A range such as 1:4 is elastic: the ranks check the layout themselves.
    if nodes.isdecimal():
        check_world_size(config.parallel, config.train, int(nodes) * processes)
    launcher = ["sft_fast.runtime.launcher", *(["--debug"] if parsed.debug else [])]
    launcher.append(config.output_dir)
    # -P: a folder of our name in the working directory is not this package.
    command = [sys.executable, "-P", "-m", *launcher, "--nproc-per-node", str(processes)]
    command += [] if nodes != "1" or given["--rdzv-endpoint"] else ["--standalone"]
    command += [
        part for flag, value in given.items() if value is not None for part in (flag, str(value))
    ]
    command += [str(TRAIN_SCRIPT), "--config", str(path)]
    command += ["--debug"] if parsed.debug else []
    if parsed.allow_change:
        command += ["--allow-change", parsed.allow_change]
    command += parsed.overrides
    if parsed.dry_run:
        print(shlex.join(command))
        return
    if processes > 1:
        # torchrun would set 1, and print a warning about it.
        os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // processes, 1)))
    if nodes != "1":
        place = given["--rdzv-endpoint"] or given["--master-addr"] or "its default address"
        print(f"meeting the other machines ({nodes} in all) at {place}", file=sys.stderr)
    sys.stdout.flush()
    # In place of this process, so that signals reach torchrun.
    os.execv(sys.executable, command)


def default_processes(parallel: ParallelConfig) -> int:
    """GPUs of this machine; without any, the ranks of one copy of the model."""
    import torch

    return torch.cuda.device_count() or parallel.model_parallel_size
