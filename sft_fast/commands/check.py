"""`sft_fast check`: everything that is wrong with a configuration, before anything starts."""

from __future__ import annotations

import argparse
import sys

from sft_fast.commands.arguments import (
    Commands,
    add_config,
    add_trust,
    config_path,
    heed_trust,
    positive,
)
from sft_fast.exit_codes import FAILED


def add(commands: Commands) -> None:
    """Describes `check` and `schema` to argparse."""
    check = commands.add_parser(
        "check",
        help="find what is wrong with a configuration, at once",
        description="Checks keys, paths, the heads of the data, layout and disk without torch. "
        "Exit status 1: there are problems.",
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
    from sft_fast.runtime.terminal import as_seen

    path = config_path(parsed)
    heed_trust(parsed, path)
    config, problems, tree = inspect_config(path, parsed.overrides)
    notes: list[str] = []
    if config is not None:
        failed = {key for problem in problems for key in problem.keys}
        findings = check_machine(config)
        found, notes = findings.problems, findings.notes
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


def run_schema(parsed: argparse.Namespace) -> None:
    """Prints the JSON schema of configurations."""
    import json

    from sft_fast.config.schema import Config

    print(json.dumps(Config.model_json_schema(), indent=1))
