"""`sft_fast verify`: are the files of a run what they were when they were written."""

from __future__ import annotations

import argparse
from pathlib import Path

from sft_fast.commands.arguments import Commands, add_run


def add(commands: Commands) -> None:
    verify = commands.add_parser(
        "verify",
        help="check checkpoints and exports against their hashes",
        description="Reads every file. Exit status 1: something is damaged.",
    )
    add_run(verify)
    verify.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    from sft_fast.manifest import MANIFEST_FILE, find_damage, read_manifest
    from sft_fast.run_files import read_object, read_run

    found = read_run(parsed.run_dir)
    folders = [*found.checkpoints]
    folders += [path for name in ("export", "adapter") if (path := found.path / name).is_dir()]
    if not folders:
        raise ValueError(f"{found.path} holds no checkpoint and no export yet")
    whole: list[Path] = []
    is_damaged = False
    for folder in folders:
        damages = find_damage(folder)
        if not damages:
            records = read_manifest(folder).values()
            size = sum(record.num_bytes for record in records) / 2**30
            print(f"{folder.name}: whole, {len(records)} files, {size:.2f} GiB")
            whole.append(folder)
            continue
        is_damaged = True
        print(f"{folder.name}: DAMAGED")
        for damage in damages:
            print(f"  {damage}")
    usable = [folder for folder in found.checkpoints if folder in whole]
    if usable:
        state = read_object(usable[-1] / "train_state.json") or {}
        print(f"a resumed run goes on from {usable[-1].name}, step {state.get('step')}")
        for name, value in state.get("fields", {}).items():
            print(f"  {name:<16}{value}")
    elif found.checkpoints:
        print(f"no checkpoint is whole; {MANIFEST_FILE} says what each must hold")
    return int(is_damaged)
