"""curves.png and report.html of a run, from what lies in its directory."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_fast.curves import draw_curves, draw_lengths, png
from sft_fast.html_page import page, table
from sft_fast.run_files import RunFiles, read_object, read_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

SAMPLES_FILE = "samples.json"
LENGTH_BINS = 40


def length_histogram(lengths: NDArray[Any]) -> dict[str, Any]:
    """Edges and counts of sample lengths [N], for the record `lengths` of metrics.jsonl."""
    import numpy as np

    counts, edges = np.histogram(lengths, bins=LENGTH_BINS)
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def write_report(run_dir: Path) -> list[Path]:
    """Writes both files; returns their paths.

    Raises:
        ValueError: it is no run directory, nothing was trained yet, or matplotlib is missing.
    """
    found = read_run(run_dir)
    curves = png(draw_curves(found))
    paths = [run_dir / "curves.png", run_dir / "report.html"]
    paths[0].write_bytes(curves)
    paths[1].write_text(report_html(found, curves), encoding="utf-8")
    return paths


def report_html(found: RunFiles, curves: bytes) -> str:
    """The document; nothing in it comes from elsewhere."""
    sections = [
        ("Result", result_section(found)),
        ("Curves", image(curves, "loss, learning rate, gradient norm, tokens per second")),
        ("Samples", samples_section(found.path)),
        ("Data", data_section(found)),
        ("Packing", packing_section(found)),
        ("Memory", memory_section(found)),
        ("Configuration", config_section(found.path)),
    ]
    body = "".join(f"<h2>{name}</h2>\n{html}\n" for name, html in sections if html)
    return page(f"Run {found.path.resolve().name}", body)


def image(content: bytes, meaning: str) -> str:
    data = base64.b64encode(content).decode()
    return f'<img alt="{escape(meaning)}" src="data:image/png;base64,{data}">'


def result_section(found: RunFiles) -> str:
    steps, evaluations = found.of_kind("step"), found.of_kind("eval")
    last = steps[-1]
    seconds = sum(record["elapsed_s"] for record in steps) / len(steps)
    rows = [
        ("steps", f"{last['step']:,}"),
        ("training loss", f"{shown(steps[0]['loss'])} to {shown(last['loss'])}"),
    ]
    if evaluations:
        first, final = evaluations[0]["loss"], evaluations[-1]["loss"]
        rows.append(("evaluation loss", f"{shown(first)} to {shown(final)}"))
    rows += [
        ("seconds a step", f"{seconds:.2f}"),
        ("tokens per second", f"{last['tokens_per_s']:,.0f}"),
        ("trained tokens per second", f"{last['supervised_tokens_per_s']:,.0f}"),
    ]
    if last.get("mfu") is not None:
        rows.append(("MFU", f"{last['mfu']:.1%}"))
    answers = found.last("exact_match")
    if answers is not None:
        text = f"{answers['exact_match']:.1%} of {answers['num_questions']} held-out questions"
        rows.append(("exact match", text))
    return table(rows)


def shown(value: float | None) -> str:
    return "NaN" if value is None else f"{value:.4f}"


def data_section(found: RunFiles) -> str:
    data, lengths = found.last("data"), found.last("lengths")
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


def packing_section(found: RunFiles) -> str:
    packing = found.last("packing")
    if packing is None:
        return ""
    return table(
        [
            ("strategy", f"{packing['strategy']}: {packing['reason']}"),
            ("rows", f"{packing['num_bins']:,} of {packing['capacity']:,} tokens"),
            ("samples a row", f"{packing['samples_per_bin']:.1f}"),
            ("padding", f"{packing['padding_share']:.2%}"),
            ("of the best possible", f"{packing['efficiency']:.2%}"),
            ("steps an epoch", f"{packing['num_steps']:,}"),
        ]
    )


def memory_section(found: RunFiles) -> str:
    """The estimate of `sft_fast plan` beside what was measured."""
    from dataclasses import asdict

    from sft_fast.architecture import architecture_from_hf
    from sft_fast.config import load_config
    from sft_fast.estimate import estimate_memory

    hf_config = read_object(found.path / "export" / "config.json")
    launch, last = found.last("launch"), found.of_kind("step")[-1]
    if hf_config is None or launch is None:
        return ""
    config = load_config(found.path / "config.yaml", [])
    packing = found.last("packing") or {}
    memory = estimate_memory(
        architecture_from_hf(hf_config),
        config,
        launch["world_size"],
        packing.get("supervised_share", 1.0),
        launch["device"] == "cuda",
    )
    rows = [(f"estimated {name}", f"{size / 1e9:.3f} GB") for name, size in asdict(memory).items()]
    rows.append(("estimated at the fullest moment", f"{memory.total / 1e9:.3f} GB"))
    what = "GPU" if launch["device"] == "cuda" else "process, libraries included"
    rows.append((f"measured peak of the {what}", f"{last['memory_gib'] * 2**30 / 1e9:.3f} GB"))
    return table(rows)


def config_section(run_dir: Path) -> str:
    path = run_dir / "config.yaml"
    if not path.is_file():
        return ""
    text = escape(path.read_text(encoding="utf-8"))
    return f"<details><summary>every key</summary><pre>{text}</pre></details>"


def samples_section(run_dir: Path) -> str:
    """Held-out questions with the answers before and after; see samples.py."""
    found = read_object(run_dir / SAMPLES_FILE)
    if found is None:
        return ""
    html = []
    for sample in found["samples"]:
        html.append(
            table(
                [
                    ("question", sample["question"]),
                    ("expected", sample["expected"]),
                    (f"before ({found['before']})", sample["before"]),
                    ("after", sample["after"]),
                ]
            )
        )
    return "<br>\n".join(html)
