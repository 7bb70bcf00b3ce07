"""The command `sft_fast`: subcommands, each of which imports what it needs when it runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a subcommand.

    Args:
        arguments: what follows the command's name; None: those of this process.

    Returns: 0, or 2 where the user's input is wrong.
    """
    parsed = _parser().parse_args(arguments)
    try:
        parsed.run(parsed)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sft_fast", description="Supervised fine-tuning on megatron-core."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
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
    convert.set_defaults(run=_convert)
    report = commands.add_parser(
        "data-report", help="tokenise the data of a configuration and say what is in it"
    )
    report.add_argument("config", type=Path, help="configuration file")
    report.add_argument("overrides", nargs="*", metavar="a.b=c", help="keys to change")
    report.add_argument("--json", action="store_true", help="print one JSON object")
    report.set_defaults(run=_data_report)
    return parser


def _convert(parsed: argparse.Namespace) -> None:
    from sft_fast.data.convert import convert
    from sft_fast.data.source import Source, load_rows

    fields = {}
    for text in parsed.field:
        name, equals, column = text.partition("=")
        if not name or not equals or not column:
            raise ValueError(f"--field {text}: expected FIELD=COLUMN, as in instruction=question")
        fields[name] = column
    rows = load_rows(parsed.source, parsed.split, streaming=parsed.streaming)
    written, rejected = convert(
        Source(rows, parsed.format, fields), parsed.output, parsed.skip_bad_rows
    )
    print(f"{parsed.output}: {written} rows" + (f", {rejected} rejected" if rejected else ""))


def _data_report(parsed: argparse.Namespace) -> None:
    import json
    from dataclasses import asdict

    from sft_fast.config import load_config
    from sft_fast.data.configured import find_sources, open_configured_store
    from sft_fast.data.mixture import check_eval_is_not_train
    from sft_fast.data.statistics import store_statistics
    from sft_fast.data.tokenizer import load_tokenizer

    config = load_config(parsed.config, parsed.overrides)
    path = config.tokenizer.path or config.model.path
    assert path is not None, "the configuration demands one of the two"
    tokenizer = load_tokenizer(path, config.tokenizer.chat_template)
    stores, found = {}, {}
    for part in ("train", "eval"):
        sources = find_sources(config, part)
        if sources is None:
            continue
        store = stores[part] = open_configured_store(config, sources, tokenizer, _print_progress)
        statistics = store_statistics(store, tokenizer)
        found[part] = {"build": asdict(store.report), "store": asdict(statistics)}
        if not parsed.json:
            print(f"data.{part}\n{store.report.summary()}\n{statistics.summary()}\n")
    if parsed.json:
        print(json.dumps(found, ensure_ascii=False))
    if "eval" in stores and config.data.eval_overlap == "error":
        check_eval_is_not_train(stores["train"], stores["eval"])


def _print_progress(text: str) -> None:
    print(text, file=sys.stderr)
