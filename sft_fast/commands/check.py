"""`sft_fast check`: everything that is wrong with a configuration, before anything starts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sft_fast.commands.arguments import (
    Commands,
    add_config,
    add_trust,
    config_path,
    heed_trust,
    positive,
)
from sft_fast.exit_codes import FAILED

if TYPE_CHECKING:
    from sft_fast.errors import Problem


def add(commands: Commands) -> None:
    """Describes `check` and `schema` to argparse."""
    check = commands.add_parser(
        "check",
        help="find what is wrong with a configuration, at once",
        description="Checks keys, paths, the heads of the data, layout and disk without torch. "
        "Of a folder: the keys alone, with a line for each *.yaml in it. Exit status 1: there "
        "are problems.",
    )
    add_config(check)
    add_trust(check)
    check.add_argument(
        "--ranks", type=positive, metavar="N", help="also check the layout of N ranks"
    )
    check.set_defaults(run=run)
    schema = commands.add_parser("schema", help="print the JSON schema of configurations")
    schema.set_defaults(run=run_schema)


def run(parsed: argparse.Namespace) -> int:
    """Prints all problems of a configuration; returns 1 where there are any."""
    from sft_fast.config.layout import rank_problem
    from sft_fast.config.schema import inspect_config
    from sft_fast.config.validation import located
    from sft_fast.errors import ConfigError
    from sft_fast.preflight.machine_checks import check_machine
    from sft_fast.recipes import RECIPES
    from sft_fast.runtime.terminal import as_seen

    is_name = parsed.config.parent == Path(".")
    if parsed.config.is_dir() and not (is_name and (RECIPES / f"{parsed.config}.yaml").is_file()):
        return check_folder(parsed)
    path = config_path(parsed)
    heed_trust(parsed, path)
    config, problems, tree = inspect_config(path, parsed.overrides)
    notes = list(tree.notes)
    if config is not None:
        failed = {key for problem in problems for key in problem.keys}
        findings = check_machine(config)
        found = findings.problems
        notes += findings.notes
        if parsed.ranks is not None:
            problem = rank_problem(config.parallel, config.train, parsed.ranks)
            found += [] if problem is None else [problem]
            size = parsed.ranks // config.parallel.model_parallel_size
            notes.append(f"layout: {parsed.ranks} ranks give data parallel size {size}")
        problems += located(tree, [p for p in found if not failed.intersection(p.keys)])
    if problems:
        print(as_seen(str(ConfigError(problems, str(path))), sys.stderr), file=sys.stderr)
        return FAILED
    print("\n".join([f"{path}: no problems found", *(f"  {note}" for note in notes)]))
    return 0


def check_folder(parsed: argparse.Namespace) -> int:
    """Prints a line for each configuration in a folder; returns 1 where one has problems."""
    from sft_fast.config.layout import rank_problem
    from sft_fast.config.schema import inspect_config
    from sft_fast.errors import ConfigError
    from sft_fast.redact import redact
    from sft_fast.registry import distrust

    folder: Path = parsed.config
    paths = sorted(path for path in folder.rglob("*.yaml") if path.is_file())
    if not paths:
        raise ValueError(f"{folder} has no *.yaml; expected a folder of configurations")
    refused = 0
    for path in paths:
        # A folder is looked through: without consent, nothing that its files name is run.
        distrust(None if parsed.trust else path)
        problems: Sequence[Problem]
        notes: Sequence[str] = ()
        try:
            config, problems, tree = inspect_config(path, parsed.overrides)
            notes = tree.notes
            if config is not None and parsed.ranks is not None:
                problem = rank_problem(config.parallel, config.train, parsed.ranks)
                problems = [*problems, *([] if problem is None else [problem])]
        except ConfigError as error:
            problems = error.problems
        refused += bool(problems)
        if problems:
            reasons = "; ".join(one_line(problem) for problem in problems)
            print(redact(f"{path.relative_to(folder)}: refused: {reasons}"))
        else:
            print(f"{path.relative_to(folder)}: accepted{f', {len(notes)} notes' if notes else ''}")
    print(f"{len(paths) - refused} of {len(paths)} accepted; `sft_fast check FILE` says more")
    return FAILED if refused else 0


def one_line(problem: Problem) -> str:
    """The keys of a problem by their last names, what is wrong and what would be right."""
    keys = ", ".join(key.partition(" ")[0].rpartition(".")[2] for key in problem.keys)
    return f"{keys + ' is ' if keys else ''}{problem.found}; expected {problem.expected}"


def run_schema(parsed: argparse.Namespace) -> None:
    """Prints the JSON schema of configurations."""
    import json

    from sft_fast.config.schema import Config

    print(json.dumps(Config.model_json_schema(), indent=1))
