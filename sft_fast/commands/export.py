"""`sft_fast export`: a Hugging Face model from a checkpoint, in one process."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from sft_fast.commands.arguments import Commands, add_run, add_trust, positive
from sft_fast.commands.launch import TRAIN_SCRIPT
from sft_fast.exit_codes import FAILED
from sft_fast.models.choices import Dtype
from sft_fast.registry import SFT

if TYPE_CHECKING:
    from sft_fast.runtime.run_files import RunFiles

# One process, without gradients, and without what only training needs.
OVERRIDES = (
    "model.transformer_impl=local",
    "model.fp8=none",
    "model.offload_layers=0",
    "parallel.tensor=1",
    "parallel.pipeline=1",
    "parallel.virtual_pipeline=1",
    "parallel.context=1",
    "parallel.expert=1",
    "parallel.expert_tensor=1",
    "parallel.sequence=false",
)

OF_RANKS = re.compile(
    r"(LOCAL_|GROUP_|ROLE_|)(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|TORCHELASTIC_\w+|PET_\w+"
)
"""Variables that describe the ranks of a job."""


def add(commands: Commands) -> None:
    """Describes `export` to argparse."""
    export = commands.add_parser(
        "export",
        help="write a Hugging Face model from a checkpoint",
        description="Needs the run's directory, the model that it started from, and no data. Where "
        "that model lies elsewhere by now: model.path=DIR. Exit status 4: it is damaged.",
    )
    add_run(export)
    add_trust(export)
    export.add_argument("--step", type=positive, help="of the checkpoint; default: the newest")
    export.add_argument("--to", type=Path, metavar="DIR", help="default: OUT/export_STEP")
    export.add_argument("--dtype", choices=get_args(Dtype), help="default: as trained")
    export.add_argument("overrides", nargs="*", metavar="a.b=c", help="keys to change")
    export.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Exports a checkpoint in a process of its own; returns its exit code."""
    from sft_fast.config.schema import load_config
    from sft_fast.registry import distrust
    from sft_fast.runtime.processes import die_with_parent
    from sft_fast.runtime.run_files import export_path, read_run

    files = read_run(parsed.run_dir)
    step, checkpoint = choose(files, parsed.step)
    target = parsed.to or export_path(files.path, step)
    if target.exists():
        raise ValueError(f"{target} exists; name another directory with --to")
    saved = files.path / "config.yaml"
    distrust(None if parsed.trust else saved)
    config = load_config(saved, parsed.overrides)
    check_overrides(parsed.overrides, config.stage)
    cache = config.data.cache_dir or files.path.absolute() / "data"
    overrides = [
        *parsed.overrides,
        *OVERRIDES,
        # Supervised fine-tuning exports without the user's code, which may be elsewhere by now.
        *(["plugins=[]"] if config.stage == SFT else []),
        f"checkpoint.resume={checkpoint.absolute()}",
        f"data.cache_dir={cache}",
    ]
    if parsed.dtype is not None:
        overrides.append(f"export.dtype={parsed.dtype}")
    with workplace(target) as work:
        write_story(files, step, work)
        # -P: a folder of our name in the working directory is not this package.
        command = [sys.executable, "-P", str(TRAIN_SCRIPT), "--export", "--config", str(saved)]
        command += [*overrides, f"output_dir={work}", *(["--debug"] if parsed.debug else [])]
        command += [] if parsed.trust else ["--distrust"]
        print(f"exporting step {step} of {files.path}", flush=True)
        result = subprocess.run(
            command,
            check=False,
            stdout=subprocess.PIPE,
            text=True,
            env=lone_environment(),
            preexec_fn=die_with_parent,
        )
        if result.returncode != 0:
            print(result.stdout, end="")
            if not checkpoint.exists():
                raise ValueError(
                    f"the run deleted {checkpoint} meanwhile, as checkpoint.keep_last says; export "
                    "a later one"
                )
            return result.returncode if result.returncode > 0 else killed(-result.returncode)
        os.rename(work / "export", target)
    print(target)
    return 0


def lone_environment() -> dict[str, str]:
    """The environment without what says that this process is one of several, as it does in the
    pods of an operator: the export would wait for the others."""
    return {name: value for name, value in os.environ.items() if not OF_RANKS.fullmatch(name)}


def check_overrides(overrides: list[str], stage: str) -> None:
    """Raises ValueError for a key that an export sets itself.

    The plugin of a stage may be elsewhere by now.
    """
    own = {text.partition("=")[0] for text in OVERRIDES}
    own |= {"stage", "output_dir", "checkpoint.resume", *(["plugins"] if stage == SFT else [])}
    for key in (text.partition("=")[0] for text in overrides):
        if key in own:
            raise ValueError(f"{key}: an export sets it itself; there are --to DIR and --step N")


def killed(number: int) -> int:
    """Says which signal ended the process that exports; returns the exit code."""
    why = "; the system does that when memory runs out" if number == signal.SIGKILL else ""
    print(f"error: {signal.Signals(number).name} ended the export{why}", file=sys.stderr)
    return FAILED


def choose(files: RunFiles, step: int | None) -> tuple[int, Path]:
    """The checkpoint of a step, or the newest, with its step.

    Raises:
        ValueError: there is none.
    """
    from sft_fast.runtime.run_files import checkpoint_step

    steps = {checkpoint_step(path) or 0: path for path in files.checkpoints}
    if not steps or (step is not None and step not in steps):
        folder, of = files.path / "checkpoints", "" if step is None else f" of step {step}"
        there = ", ".join(map(str, steps)) or "none"
        raise ValueError(f"{folder} holds no checkpoint{of}; there are: {there}")
    chosen = max(steps) if step is None else step
    return chosen, steps[chosen]


@contextlib.contextmanager
def workplace(target: Path) -> Iterator[Path]:
    """A directory on the file system of `target`, that it can be renamed from.

    Raises:
        ValueError: there can be none.
    """
    from sft_fast.runtime.workplaces import make_workplace

    try:
        folder = make_workplace(target.parent, "export")
    except OSError as error:
        raise ValueError(
            f"{target} cannot be written ({error.strerror}); name one with --to"
        ) from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_story(files: RunFiles, step: int, folder: Path) -> None:
    """Copies what the model card tells of: the configuration, and the run up to a step."""
    from sft_fast.runtime.run_directory import RUN_MARKER

    (folder / RUN_MARKER).touch()
    shutil.copy(files.path / "config.yaml", folder)
    until = [record for record in files.records if record.get("step", 0) <= step]
    lines = [json.dumps(record) + "\n" for record in until]
    (folder / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
