"""`sft_fast verify`: are files what they were when they were written."""

from __future__ import annotations

import argparse
from pathlib import Path

from sft_fast.commands.arguments import Commands
from sft_fast.exit_codes import DAMAGED


def add(commands: Commands) -> None:
    """Describes `verify` to argparse."""
    verify = commands.add_parser(
        "verify",
        help="check checkpoints and exports against their hashes",
        description="Reads every file. Exit status 4: something is damaged.",
    )
    verify.add_argument(
        "folder", type=Path, metavar="OUT", help="output_dir of a run, a checkpoint or an export"
    )
    verify.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Compares all files with their hashes; returns DAMAGED where one differs."""
    from sft_fast.errors import DamageError
    from sft_fast.runtime.run_files import MANIFEST_FILE, read_run

    folder = parsed.folder.absolute() if parsed.folder.name == "" else parsed.folder
    if (folder / MANIFEST_FILE).exists():
        return 0 if is_whole(folder) else DAMAGED
    if next(folder.glob("*.safetensors"), None) is not None:
        raise DamageError(
            f"{folder} has no {MANIFEST_FILE}: it was lost, or another program made this"
        )
    found = read_run(folder)
    if not found.checkpoints and not found.exports:
        raise ValueError(f"{found.path} holds no checkpoint and no export yet")
    whole = [path for path in found.checkpoints if is_whole(path)]
    damaged_exports = [path for path in found.exports if not is_whole(path)]
    if whole:
        tell_resume(whole[-1])
    elif found.checkpoints:
        print(f"no checkpoint is whole; {MANIFEST_FILE} says what each must hold")
    return DAMAGED if damaged_exports or len(whole) < len(found.checkpoints) else 0


def is_whole(folder: Path) -> bool:
    """Compares a directory with its manifest, and says what comes of it; a run that is under way
    may delete it meanwhile."""
    from sft_fast.runtime.manifest import find_damage, read_manifest

    damages = find_damage(folder)
    if damages and not folder.exists():
        print(f"{folder.name}: deleted meanwhile")
        return True
    if damages:
        print("\n  ".join([f"{folder.name}: DAMAGED", *map(str, damages)]))
        return False
    records = read_manifest(folder).values()
    size = sum(record.num_bytes for record in records) / 2**30
    print(f"{folder.name}: whole, {len(records)} files, {size:.2f} GiB")
    return True


def tell_resume(checkpoint: Path) -> None:
    """Says where a resumed run begins, and with what it must agree."""
    from sft_fast.megatron.checkpoint.train_state import read_train_state

    state = read_train_state(checkpoint)
    print(f"a resumed run starts at {checkpoint.name}, step {state.step}")
    for name, value in state.fields.items():
        print(f"  {name:<16}{value}")
