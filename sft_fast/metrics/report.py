"""curves.png and report.html of a run, from what lies in its directory."""

from __future__ import annotations

import base64
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_fast.constants import ceil_div
from sft_fast.files import read_json
from sft_fast.metrics.curves import draw_curves, draw_lengths, png
from sft_fast.metrics.html_page import page, table, tiles
from sft_fast.runtime.run_files import RunFiles, read_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

SAMPLES_FILE = "samples.json"
LENGTH_BINS = 40


def length_histogram(lengths: NDArray[Any]) -> dict[str, Any]:
    """Edges and counts of sample lengths [N], for the record `lengths` of metrics.jsonl.

    Every bin holds the same number of whole lengths, and each length is in the middle of its share.
    """
    import numpy as np

    shortest, longest = int(lengths.min()), int(lengths.max())
    width = ceil_div(longest + 1 - shortest, LENGTH_BINS)
    edges = np.arange(shortest, longest + width + 1, width) - 0.5
    counts, edges = np.histogram(lengths, bins=edges)
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def write_report(run_dir: Path) -> list[Path]:
    """Writes both files; returns their paths.

    Raises:
        ValueError: it is no run directory, nothing was trained yet, or matplotlib is missing.
    """
    run = read_run(run_dir)
    curves = png(draw_curves(run))
    paths = [run_dir / "curves.png", run_dir / "report.html"]
    paths[0].write_bytes(curves)
    paths[1].write_text(report_html(run, curves), encoding="utf-8")
    return paths


def report_html(run: RunFiles, curves: bytes) -> str:
    """The document; nothing in it comes from elsewhere."""
    sections = [
        ("", tiles(result_figures(run))),
        ("Curves", image(curves, "loss, learning rate, gradient norm, tokens per second")),
        ("Samples", samples_section(run.path)),
        ("Data", data_section(run)),
        ("Packing", packing_section(run)),
        ("Memory, planned and measured", memory_section(run)),
        ("Configuration", config_section(run.path)),
    ]
    body = "".join(
        f"<section>{f'<h2>{name}</h2>' if name else ''}\n{html}</section>\n"
        for name, html in sections
        if html
    )
    about = f'<p class="soft">{escape(headline(run))}</p>\n'
    return page(f"Run {run.path.resolve().name}", about + body)


def headline(run: RunFiles) -> str:
    """When, where and how far."""
    status, launch, last = run.status or {}, run.last("launch"), run.of_kind("step")[-1]
    words = [str(status.get("state", "")), f"{last['step']:,} steps"]
    if launch is not None:
        kind = "CPU" if launch["device"] == "cpu" else "GPU"
        words.append(f"{launch['world_size']} {kind} rank{'s' if launch['world_size'] > 1 else ''}")
    when = datetime.fromtimestamp(last["time"], UTC)
    words.append(f"last step {when:%Y-%m-%d %H:%M} UTC")
    return ", ".join(word for word in words if word)


def image(content: bytes, meaning: str) -> str:
    """A PNG as an HTML image that needs no other file."""
    data = base64.b64encode(content).decode()
    return f'<img alt="{escape(meaning)}" src="data:image/png;base64,{data}">'


def result_figures(run: RunFiles) -> list[tuple[str, str, str]]:
    """(name, figure, remark) of what one wants to know first."""
    steps, evaluations = run.of_kind("step"), run.of_kind("eval")
    last = steps[-1]
    seconds = sum(record["elapsed_s"] for record in steps) / len(steps)
    figures = []
    if evaluations:
        first, final = evaluations[0]["loss"], evaluations[-1]["loss"]
        figures.append(("evaluation loss", shown(final), f"from {shown(first)}"))
    figures.append(("training loss", shown(last["loss"]), f"from {shown(steps[0]['loss'])}"))
    answers = run.last("exact_match")
    if answers is not None:
        remark = f"of {answers['num_questions']} held-out questions"
        figures.append(("exact match", f"{answers['exact_match']:.1%}", remark))
    if last.get("expert_load") is not None:
        remark = f"of the mean, busiest of a layer; {last['empty_experts']:.1%} of all unused"
        figures.append(("expert load", f"{last['expert_load']:.2f}", remark))
    trained = f"{last['supervised_tokens_per_s']:,.0f} of them trained"
    figures.append(("tokens per second", f"{last['tokens_per_s']:,.0f}", trained))
    figures.append(("seconds a step", f"{seconds:.2f}", f"{last['step']:,} steps"))
    if last.get("mfu") is not None:
        figures.append(("MFU", f"{last['mfu']:.1%}", "of the data sheet's rate"))
    return figures


def shown(value: float | None) -> str:
    """A loss as text; NaN where there is none."""
    return "NaN" if value is None else f"{value:.4f}"


def data_section(run: RunFiles) -> str:
    """The HTML table of what the data holds; "" where it is not known."""
    data, lengths = run.last("data"), run.last("lengths")
    if data is None:
        return ""
    supervised = data["supervised_tokens"] / max(data["tokens"], 1)
    rows = [
        ("source", str(data["source"])),
        ("rows, samples", f"{data['rows']:,}, {data['samples']:,}"),
        ("tokens", f"{data['tokens']:,}, {supervised:.1%} of them trained"),
        ("longest sample", f"{data['longest']:,} tokens"),
        ("template", f"{data['template']}"),
    ]
    rows += [(f"not used: {why}", f"{count:,} rows") for why, count in data["rejected"].items()]
    html = table(rows)
    if lengths is not None:
        figure: Figure = draw_lengths(lengths["edges"], lengths["counts"])
        html += image(png(figure), "histogram of sample lengths")
    return html


def packing_section(run: RunFiles) -> str:
    """The HTML table of how samples were packed; "" where it is not known."""
    packing = run.last("packing")
    if packing is None:
        return ""
    return table(
        [
            ("strategy", f"{packing['strategy']}: {packing['reason']}"),
            ("rows", f"{packing['num_bins']:,} of {packing['capacity']:,} tokens"),
            ("samples a pack", f"{packing['samples_per_bin']:.1f}"),
            ("padding", f"{packing['padding_share']:.2%}"),
            ("of the best possible", f"{packing['efficiency']:.2%}"),
            ("steps an epoch", f"{packing['num_steps']:,}"),
        ]
    )


def memory_section(run: RunFiles) -> str:
    """The estimate of `sft_fast plan` beside what was measured."""
    from dataclasses import asdict

    from sft_fast.config.schema import load_config
    from sft_fast.models.architecture import exported_architecture
    from sft_fast.models.estimate import estimate_memory

    hf_config = read_json(run.path / "export" / "config.json")
    launch, last = run.last("launch"), run.of_kind("step")[-1]
    if hf_config is None or launch is None:
        return ""
    config = load_config(run.path / "config.yaml", [])
    packing = run.last("packing") or {}
    memory = estimate_memory(
        exported_architecture(hf_config),
        config,
        launch["world_size"],
        packing.get("supervised_share", 1.0),
        launch["device"] == "cuda",
    )
    rows = [(name, gigabytes(size)) for name, size in asdict(memory).items() if size]
    rows.append(("planned, at the fullest moment", gigabytes(memory.total)))
    what = "GPU" if launch["device"] == "cuda" else "process, libraries included"
    rows.append((f"measured peak of the {what}", gigabytes(last["memory_gib"] * 2**30)))
    return table(rows, "figures")


def readable(text: str) -> str:
    """An answer without the empty lines and control characters that untrained models love."""
    lines = (line.rstrip() for line in text.splitlines())
    kept = "\n".join(line for line in lines if line)
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in kept)


def gigabytes(size: float) -> str:
    """A size in GB, 10^9 bytes."""
    return f"{size / 1e9:.3f} GB"


def config_section(run_dir: Path) -> str:
    """The saved configuration, folded; "" where there is none."""
    path = run_dir / "config.yaml"
    if not path.is_file():
        return ""
    text = escape(path.read_text(encoding="utf-8"))
    return f"<details><summary>every key</summary><pre>{text}</pre></details>"


def samples_section(run_dir: Path) -> str:
    """Held-out questions with the answers before and after; see samples.py."""
    saved = read_json(run_dir / SAMPLES_FILE)
    if saved is None:
        return ""
    return "".join(
        table(
            [
                ("question", sample["question"]),
                ("expected", sample["expected"]),
                (f"before ({saved['before']})", readable(sample["before"])),
                ("after", readable(sample["after"])),
            ],
            "sample",
        )
        for sample in saved["samples"]
    )
