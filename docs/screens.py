"""Makes the screens of the documentation: `python docs/screens.py [FOLDER]`.

They are SVG pictures of what the commands print, drawn by rich; nothing is typed by hand.
"""

import contextlib
import io
import json
import os
import re
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

from sft_fast.cli import main
from sft_fast.commands import preview as preview_command
from sft_fast.config.schema import load_config
from sft_fast.data.tokenizer import load_tokenizer
from sft_fast.metrics.progress import ProgressLine
from sft_fast.metrics.writer import Window
from sft_fast.packing.steps import StepCounts
from sft_fast.preflight.preview import make_preview

WIDTH = 100
WRONG = """\
output_dir: outputs/my_run
model:
  path: models/nothing
data:
  train: chat.jsonl
  formt: messages
packing:
  capacity: 4096
train:
  epochs: 2
optim:
  lr: 1e-5x
"""
LLAMA3_8B = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}
ROW = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


def save(console: Console, folder: Path, name: str, title: str) -> None:
    """Writes what a console has printed as `name`.svg."""
    svg = console.export_svg(title=title)
    # Fonts from elsewhere would make a page that loads something.
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.S)
    (folder / f"{name}.svg").write_text(svg, encoding="utf-8")


def screen(**options: object) -> Console:
    """A console that records what is printed."""
    return Console(
        record=True,
        width=WIDTH,
        file=io.StringIO(),
        force_terminal=True,
        color_system="truecolor",
        highlight=False,
        **options,
    )


class Terminal(io.StringIO):
    """So that commands show their colours."""

    def isatty(self) -> bool:
        """Always: what is captured is to look like a terminal."""
        return True


def printed(arguments: list[str]) -> str:
    """What a command says, on either stream."""
    text = Terminal()
    os.environ |= {"COLUMNS": str(WIDTH), "TERM": "xterm"}
    os.environ.pop("NO_COLOR", None)
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        main(arguments)
    return text.getvalue().rstrip()


def preview(folder: Path) -> None:
    """Two chats of the demo with their masks."""
    console = screen()
    config = load_config(None, [])
    found = make_preview(config, load_tokenizer("demo"), 2003)
    chosen = [sample for sample in found.samples if sample.num_answers > 1][:2]
    preview_command.show_samples(console, type(found)(tuple(chosen), (), None, 256, ""), 2)
    save(console, folder, "preview", "sft_fast preview demo")


def check(folder: Path) -> None:
    """A configuration with three mistakes."""
    with tempfile.TemporaryDirectory() as work, contextlib.chdir(work):
        Path("my.yaml").write_text(WRONG)
        Path("chats.jsonl").write_text(ROW)
        text = printed(["check", "my.yaml"]).replace(os.path.realpath(work), "/home/me")
    console = screen()
    console.print(Text.from_ansi(text))
    save(console, folder, "check", "sft_fast check my.yaml")


def plan(folder: Path) -> None:
    """An 8B model that does not fit on the GPUs that were named."""
    with tempfile.TemporaryDirectory() as work:
        (Path(work) / "config.json").write_text(json.dumps(LLAMA3_8B))
        options = [f"model.path={work}", "parallel.tensor=1", "parallel.sequence=false"]
        arguments = ["plan", "llama3_8b", *options, "--gpu", "H100", "--ranks", "8", "--no-data"]
        text = printed(arguments)
    console = screen()
    console.print(Text.from_ansi(text))
    save(console, folder, "plan", "sft_fast plan llama3_8b --gpu H100 --ranks 8 parallel.tensor=1")


def progress(folder: Path) -> None:
    """Invented figures of one step; what is shown is the form."""
    window = Window()
    counts = StepCounts(320, 130_000, 60_000, 60_000.0, 131_072, 50_000_000)
    window.add(counts, elapsed_s=3.1, data_wait_s=0.01, flops=1.3e16)
    figures = window.speeds(peak_flops=8 * 1307.4e12)
    figures |= {
        "loss": 1.2345,
        "lr": 9.1e-6,
        "grad_norm": 0.612,
        "was_skipped": False,
        "warning": "",
    }
    figures |= {"memory_gib": 96.2, "eta_s": 3725.0}
    console = screen()
    shown = ProgressLine(1200, console)
    shown.update(420, figures)
    save(console, folder, "progress", "sft_fast train my.yaml")


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "images")
    target.mkdir(parents=True, exist_ok=True)
    for make in (preview, check, plan, progress):
        make(target)
