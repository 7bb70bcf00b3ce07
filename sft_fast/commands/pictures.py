"""`sft_fast plot`: curves.png and report.html of a run, also while it is under way."""

from __future__ import annotations

import argparse

from sft_fast.commands.arguments import Commands, add_run, add_trust, not_negative, positive


def add(commands: Commands) -> None:
    """Describes `plot` to argparse."""
    plot = commands.add_parser("plot", help="draw a run: curves.png and report.html")
    add_run(plot)
    add_trust(plot)
    plot.add_argument(
        "--samples",
        type=not_negative,
        default=0,
        metavar="N",
        help="also let the models before and after answer N held-out questions",
    )
    plot.add_argument("--max-new-tokens", type=positive, default=128, help="longest answer (128)")
    plot.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> None:
    """Writes curves and report of a run."""
    from sft_fast.metrics.report import write_report

    if parsed.samples > 0:
        from sft_fast.evaluation.samples import write_samples
        from sft_fast.registry import distrust

        distrust(None if parsed.trust else parsed.run_dir / "config.yaml")
        write_samples(parsed.run_dir, parsed.samples, parsed.max_new_tokens)
    for path in write_report(parsed.run_dir):
        print(path)
