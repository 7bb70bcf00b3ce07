"""`sft_fast convert` and `data-report`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_fast.commands.arguments import (
    Commands,
    add_config,
    add_trust,
    config_tokenizer,
    read_config,
)
from sft_fast.exit_codes import FAILED

if TYPE_CHECKING:
    from sft_fast.config.sections import DataConfig, DataSource
    from sft_fast.data.store import TokenStore


def add(commands: Commands) -> None:
    """Describes `convert` and `data-report` to argparse."""
    convert = commands.add_parser(
        "convert", help="write any data source as a JSON Lines file of messages"
    )
    convert.add_argument("source", help="file, directory, glob, hub name or demo; as data.train")
    convert.add_argument("output", type=Path, help="the .jsonl file to write; must not exist")
    convert.add_argument("--split", help="as data.train_split; the default is train")
    convert.add_argument("--format", default="auto", help="as data.format; the default is auto")
    convert.add_argument(
        "--field",
        action="append",
        default=[],
        metavar="FIELD=COLUMN",
        help="as an entry of data.fields; may be repeated",
    )
    convert.add_argument("--streaming", action="store_true", help="as data.streaming")
    convert.add_argument(
        "--skip-bad-rows", action="store_true", help="list them in OUTPUT.rejected and go on"
    )
    convert.set_defaults(run=run_convert)
    report = commands.add_parser(
        "data-report", help="tokenise the data of a configuration and say what is in it"
    )
    add_config(report)
    add_trust(report)
    report.add_argument("--json", action="store_true", help="print one JSON object")
    report.add_argument(
        "--near-duplicates",
        action="store_true",
        help="count samples that are nearly the same as another; needs datasketch",
    )
    report.add_argument(
        "--fix",
        action="store_true",
        help="print the lines of YAML that make the data read right, and write files anew, as "
        "NAME.fixed.jsonl in this folder, where no lines do",
    )
    report.set_defaults(run=run_report, hides_torch=True)


def run_convert(parsed: argparse.Namespace) -> None:
    """Writes a source as JSON Lines of messages."""
    from sft_fast.data.convert import convert
    from sft_fast.data.source import Source, load_records

    fields = {}
    for text in parsed.field:
        name, equals, column = text.partition("=")
        if not name or not equals or not column:
            raise ValueError(f"--field {text}: expected FIELD=COLUMN, as in instruction=question")
        fields[name] = column
    rows = load_records(parsed.source, parsed.split, streaming=parsed.streaming)
    written, rejected = convert(
        Source(rows, parsed.format, fields), parsed.output, parsed.skip_bad_rows
    )
    print(f"{parsed.output}: {written} records" + (f", {rejected} rejected" if rejected else ""))


def run_report(parsed: argparse.Namespace) -> int:
    """Prints the statistics of the data of a configuration; returns 1 where --fix finds none."""
    import json
    from dataclasses import asdict

    from sft_fast.data.build import check_store
    from sft_fast.data.from_config import (
        build_options,
        find_sources,
        open_data_store,
        stage_options,
    )
    from sft_fast.data.mixture import check_eval_is_not_train
    from sft_fast.data.near_duplicates import near_duplicates, with_choice
    from sft_fast.data.statistics import store_statistics

    config = read_config(parsed)
    if parsed.fix:
        return print_fixes(config.data)
    if config.data.streaming:
        raise ValueError(
            "data.streaming: a report needs all samples, and a stream may have no end; take a part "
            "of it, for example data.streaming=false data.train_split=train[:10000], or look at "
            "its first records with sft_fast preview"
        )
    tokenizer = config_tokenizer(config.model, config.tokenizer)
    options = build_options(config.model, config.data, config.packing, stage=stage_options(config))
    stores: dict[str, TokenStore] = {}
    found: dict[str, dict[str, Any]] = {}
    for part in ("train", "eval"):
        sources = find_sources(config.data, part)
        if sources is None:
            continue
        # How long the samples are is what is asked: those that are too long are in the report.
        store = stores[part] = open_data_store(
            sources,
            tokenizer,
            options.of_any_length(),
            config.data,
            config.output_dir,
            print_progress,
        )
        others = stores["train"] if part == "eval" else None
        choice, size = config.data.near_duplicates, options.group_size
        store = stores[part] = with_choice(store, choice, others, size)
        trains_answers = options.stage.rules().trains_answers
        statistics = store_statistics(
            store, tokenizer, config.packing.capacity, trains_answers=trains_answers
        )
        found[part] = {"build": asdict(store.report), "store": asdict(statistics)}
        near = near_duplicates(store, others) if parsed.near_duplicates else None
        if near is not None:
            origins = [[store.origin(n), (others or store).origin(m)] for n, m in near]
            found[part]["near_duplicates"] = origins
        if not parsed.json:
            text = f"data.{part}\n{store.summary()}\n{statistics.summary()}\n"
            print(text if near is None else f"{text}{near_text(origins, part)}\n")
    if parsed.json:
        print(json.dumps(found, ensure_ascii=False))
    for store in stores.values():
        check_store(store, options)
    if "eval" in stores and config.data.eval_overlap == "error":
        check_eval_is_not_train(stores["train"], stores["eval"])
    return 0


def print_fixes(data: DataConfig) -> int:
    """Prints, as YAML, what makes each source read right; returns 1 where nothing does."""
    import yaml

    from sft_fast.data.fix import find_fix, write_fix
    from sft_fast.data.from_config import find_sources

    is_lost = False
    for part in ("train", "eval"):
        configured = getattr(data, part)
        # What is held out of the training data is read as they are.
        sources = [] if configured is None else find_sources(data, part) or []
        for number, source in enumerate(sources):
            key = f"data.{part}" + ("" if isinstance(configured, str) else f"[{number}]")
            try:
                fix = find_fix(source)
            except ValueError as error:
                print(f"# {key}: nothing was found for: {error}")
                is_lost = True
                continue
            if fix is None:
                print(f"# {key}: all is read")
                continue
            print(f"# {key}: {fix.why}")
            settings = {name: value for name, value in fix.settings.items() if value}
            name = configured if isinstance(configured, str) else source_path(configured[number])
            if fix.records:
                output = Path(f"{Path(source.records.files[0]).name.split('.')[0]}.fixed.jsonl")
                written, rejected = write_fix(fix, output)
                left_out = f", {rejected} left out: {output}.rejected" if rejected else ""
                print(f"# {written} records written{left_out}")
                name = str(output)
            lines: Any = [{"path": name, **settings}]
            if isinstance(configured, str):
                lines = {"data": {part: name, **settings}}
            print(yaml.safe_dump(lines, sort_keys=False, allow_unicode=True), end="")
    return FAILED if is_lost else 0


def source_path(entry: str | DataSource) -> str:
    """What an entry of a list of sources names."""
    return entry if isinstance(entry, str) else entry.path


def near_text(pairs: list[list[str]], part: str) -> str:
    """What is said of samples that are nearly another, each with what it is like."""
    what = "an earlier sample" if part == "train" else "a training sample"
    if not pairs:
        return f"  0 samples are nearly {what}\n"
    shown = ", ".join(f"{sample} ({like})" for sample, like in pairs[:3])
    return (
        f"! {len(pairs)} samples are nearly {what}, first {shown}; data.near_duplicates: drop "
        "leaves them out\n"
    )


def print_progress(text: str) -> None:
    """Prints to standard error, which a redirected report does not hold."""
    print(text, file=sys.stderr)
