"""`sft_fast preview`: which tokens are trained, before a GPU is touched."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from sft_fast.commands.arguments import (
    Commands,
    add_config,
    add_trust,
    config_tokenizer,
    not_negative,
    positive,
    read_config,
)
from sft_fast.data.choices import Part
from sft_fast.exit_codes import FAILED

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from sft_fast.preflight.preview import Preview, Shown

STYLES = {
    "trained": "#ffffff on #1a6b35",
    "trained special": "bold bright_yellow on #1a6b35",
    "masked": "bright_black",
    "masked special": "magenta",
}
KEPT = "\n\t\u200c\u200d"
# Where there are no colours, trained text stands between these.
MARKS = ("\u27e6", "\u27e7")


def add(commands: Commands) -> None:
    """Describes `preview` to argparse."""
    preview = commands.add_parser(
        "preview",
        help="show what is trained, and how samples are packed",
        description="Renders and packs the first records as a run would. Exit status 1: none of "
        "them can be used.",
    )
    add_config(preview)
    add_trust(preview)
    preview.add_argument(
        "-n", "--samples", type=not_negative, default=3, help="samples to show (3)"
    )
    preview.add_argument(
        "--rows", type=positive, default=100, help="records of each source to read (100)"
    )
    preview.add_argument("--part", choices=get_args(Part), default="train")
    preview.add_argument("--html", type=Path, metavar="FILE", help="write all samples to a file")
    preview.add_argument("--bins", type=not_negative, default=3, help="packs to show (3)")
    preview.set_defaults(run=run, hides_torch=True)


def run(parsed: argparse.Namespace) -> int:
    """Shows samples and their masks; returns 1 where no record can be used."""
    from rich.console import Console

    from sft_fast.preflight.preview import make_preview

    config = read_config(parsed)
    preview = make_preview(
        config, config_tokenizer(config.model, config.tokenizer), parsed.rows, parsed.part
    )
    if parsed.html is not None:
        from sft_fast.preflight.preview_html import preview_html

        title = f"data.{parsed.part} of {parsed.config}"
        text = preview_html(preview, title, max(parsed.bins, 10))
        parsed.html.write_text(text, encoding="utf-8")
        print(f"{parsed.html}: {len(preview.samples)} samples")
        return 0 if preview.samples else FAILED
    console = Console(highlight=False, soft_wrap=True)
    show_samples(console, preview, parsed.samples)
    show_bins(console, preview, parsed.bins)
    return 0 if preview.samples else FAILED


def show_samples(console: Console, preview: Preview, count: int) -> None:
    """Prints samples with their trained tokens marked."""
    from rich.text import Text

    legend = Text("legend: ")
    if console.color_system:
        for kind, style in STYLES.items():
            legend.append(kind, style).append("  ")
    else:
        legend.append(f"{MARKS[0]}trained{MARKS[1]} masked")
    console.print(legend, "\n")
    for sample in preview.samples[:count]:
        console.print(Text(sample.summary(), "bold"))
        for warning in sample.warnings:
            console.print(Text(f"  {warning}", "yellow"))
        console.print(sample_text(sample, console.color_system is not None), "\n")
    for message in preview.rejected[:count]:
        console.print(Text(f"not used as it is: {message}", "yellow"))
    if len(preview.rejected) > count:
        console.print(f"and {len(preview.rejected) - count} more")


def sample_text(sample: Shown, in_colours: bool) -> Text:
    """A sample as styled text, with marks where there are no colours."""
    from rich.text import Text

    from sft_fast.preflight.preview import runs

    text = Text()
    was_trained = False
    for kind, part in runs(sample):
        is_trained = kind.startswith("trained")
        if not in_colours and is_trained != was_trained:
            text.append(MARKS[0] if is_trained else MARKS[1])
        was_trained = is_trained
        # Control characters of the data would reach the terminal; joiners only make one character.
        plain = "".join(c if c.isprintable() or c in KEPT else "\ufffd" for c in part)
        text.append(plain, STYLES[kind] if in_colours else "")
    if not in_colours and was_trained:
        text.append(MARKS[1])
    return text


def show_bins(console: Console, preview: Preview, count: int) -> None:
    """Prints what each of the first packs holds."""
    if preview.bins is None:
        return
    console.print(f"\nthese {len(preview.samples)} samples in {preview.bins.num_bins} packs")
    for number in range(min(count, preview.bins.num_bins)):
        console.print(f"  pack {number + 1}: {preview.bin_summary(number)}")
